"""Train image classifiers on CIFAR: composable Hydra configuration over a plain PyTorch trainer."""
