"""Vision-language models of the Qwen2-VL class: checkpoints and stand-ins, questions about pictures, a tiny one that is trained here.

Needs transformers; the tiny model's digits need scikit-learn, photographs scikit-image."""
