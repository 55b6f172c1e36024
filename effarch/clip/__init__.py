"""Checkpoints, images, class-name heads and towers of CLIP and its relatives.

Needs transformers; CIFAR-10 needs torchvision, digits scikit-learn."""
