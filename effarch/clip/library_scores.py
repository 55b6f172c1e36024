"""Scores of heads and MLP channels by the torch-pruning library, to compare with ours."""

import warnings

import torch

from effarch.checks import check


def library_scores(clip, loss):
    """{(tower, layer, kind): (count,)} torch-pruning's GroupTaylorImportance of the heads and channels of a CLIPModel of transformers.

    loss: a scalar that depends on all its weights; its gradients are used up. ImportError, one line, without torch-pruning. The library
    knows channels only: a head's score is the sum over its channels of queries, keys, values and what reads them, which it finds to belong together."""
    try:
        import torch_pruning
    except ImportError:
        raise ImportError("these scores need the package torch-pruning: pip install torch-pruning") from None
    check(type(clip).__name__ == "CLIPModel", "clip", type(clip).__name__, "a CLIPModel of transformers")
    clip.zero_grad()
    loss.backward()
    side, importance, scores = clip.config.vision_config.image_size, torch_pruning.importance.GroupTaylorImportance(), {}
    device = next(clip.parameters()).device
    inputs = {"vision": dict(pixel_values=torch.zeros(1, 3, side, side, device=device)),
              "text": dict(input_ids=torch.ones(1, clip.config.text_config.max_position_embeddings, dtype=torch.long, device=device))}
    for tower, given in inputs.items():
        module = getattr(clip, f"{tower}_model")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # CLS and position embeddings stay whole, whatever the library assumes
            graph = torch_pruning.DependencyGraph().build_dependency(module, given, output_transform=lambda out: out.last_hidden_state)

        def score(part, units, graph=graph):
            group = graph.get_pruning_group(part, torch_pruning.prune_linear_out_channels, list(range(part.out_features)))
            return importance(group).unflatten(0, (units, -1)).sum(1).detach()

        for i, layer in enumerate(module.encoder.layers):
            attention = layer.self_attn
            scores[tower, i, "heads"] = score(attention.v_proj, attention.v_proj.out_features // attention.head_dim)
            scores[tower, i, "channels"] = score(layer.mlp.fc1, layer.mlp.fc1.out_features)
    clip.zero_grad()
    return scores
