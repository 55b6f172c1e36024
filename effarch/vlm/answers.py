"""How a model answers with fewer vision tokens: how likely it finds, token by token, what it said with all of them."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def greedy_answer(model, inputs, most):
    """(1, n) the model's greedy answer, at most so many tokens."""
    said = model.generate(**inputs, max_new_tokens=most, do_sample=False, num_beams=1, repetition_penalty=1.0)
    return said[:, inputs["input_ids"].shape[1]:]


@torch.no_grad()
def answer_logits(model, inputs, answer):
    """(n, vocabulary) float32 logits of each token of `answer` (1, n), on the cache that the prompt left: two calls."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    logits = out.logits[0, -1:]
    if answer.shape[1] > 1:
        more = model(input_ids=answer[:, :-1], past_key_values=out.past_key_values, use_cache=True)
        logits = torch.cat([logits, more.logits[0]])
    return logits.float()


def judge_answer(logits, dense, answer):
    """Columns for one question: same_answer (would the greedy answer be the same), token_agreement, kl (nats, of the dense
    distribution from the reduced one) and perplexity of the answer. Logits (n, vocabulary) that are not finite: status nan."""
    if not logits.isfinite().all():
        return dict(status="nan")
    say, full = F.log_softmax(logits, -1), F.log_softmax(dense, -1)
    same = logits.argmax(-1) == dense.argmax(-1)
    loss = -say.gather(1, answer.view(-1, 1).to(say.device)).mean()
    return dict(same_answer=float(same.all()), token_agreement=float(same.float().mean()),
                kl=float((full.exp() * (full - say)).sum(-1).mean()), perplexity=float(loss.exp()))
