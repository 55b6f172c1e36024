"""A training without a schedule: a constant rate, and the running mean of the weights is what is judged."""

import torch
from torch import nn


class AveragedTraining:
    """AdamW at a constant rate after a short warm-up; `judged` is a copy of the network with the mean of its weights.

    The mean leans on the last tenth of the steps so far (Polyak and Juditsky, 1992), so that every step of one training is the end
    of a good training of that length: no schedule has to be planned for it. network: an nn.Module; loss(): draws a batch and
    returns the loss to be made small; rate, warm (steps), decay: of AdamW."""

    def __init__(self, network, loss, rate=1e-3, warm=20, decay=0.05):
        self.network, self.loss, self.rate, self.warm, self.steps = network, loss, rate, warm, 0
        self._mean = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=self._lean)
        self.judged = self._mean.module.eval()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)

    def _lean(self, mean, now, _):
        torch._foreach_lerp_(mean, now, 10 / (10 + self.steps))

    def step(self):
        """One step; returns its loss, detached."""
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = self.rate * min(1.0, self.steps / self.warm)
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self._mean.update_parameters(self.network)
        return loss.detach()

    def until(self, steps):
        """Go on until so many steps are done; returns the last loss (NaN if none was left to do)."""
        loss = torch.tensor(float("nan"))
        while self.steps < steps:
            loss = self.step()
        return loss
