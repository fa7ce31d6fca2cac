"""Any image classifier of torchvision, optionally with weights from a local file."""

import logging
import re
from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

log = logging.getLogger(__name__)


def classifier(
    image_shape: tuple[int, int, int],
    num_classes: int,
    name: str = "mobilenet_v3_small",
    weights: str | None = None,
) -> nn.Module:
    """Build a torchvision classifier that maps float images `(b, 3, h, w)` to logits `(b, num_classes)`.

    https://docs.pytorch.org/vision/stable/models.html. GoogLeNet and Inception v3 come without their auxiliary heads;
    torchvision's weights for these two expect data.mean and data.std of 0.5.

    Args:
        image_shape: 3, height, width.
        num_classes: length of each row of logits.
        name: as in torchvision, for example "resnet50".
        weights: file of a state dict to start from, as torchvision's own weights are stored: name -> tensor. A
            classification head for another number of classes is left out of it.

    Raises:
        ValueError: unknown name, images the model can't take, or weights of another model.
        FileNotFoundError: no such file of weights.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = get_close_matches(name.lower(), names) or ["resnet18", "vit_b_16"]
        raise ValueError(f"model.name={name} is no classifier of torchvision: try {', '.join(close)}")
    channels, height, width = image_shape
    shape = f"{channels} x {height} x {width}"
    if channels != 3:
        raise ValueError(f"model=torchvision needs images of 3 channels, not {shape}: use model=net, mlp or resnet18")

    arguments: dict[str, object] = {}
    if name.startswith("vit_"):
        arguments = {"image_size": height}
    elif name == "maxvit_t":
        arguments = {"input_size": (height, width)}
    elif name in ("googlenet", "inception_v3"):  # the default for init_weights is the same, with a warning
        arguments = {"aux_logits": False, "init_weights": True}
    try:
        model = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **arguments)
        with torch.no_grad():
            model.eval()(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, AssertionError) as error:  # the types vary from model to model
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"model.name={name} cannot take {shape} images: {reason}; try data.image_size=224") from error
    if weights is not None:
        _load(model, weights)
    return model.train()


def _load(model: nn.Module, weights: str) -> None:
    file = Path(weights).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"model.weights={weights}: no such file; give the file of a state dict, or null for none"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes in another format can raise nearly anything
        reason = f"cannot be read as tensors written by torch.save ({type(error).__name__})"
        raise ValueError(f"model.weights={weights}: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"model.weights={weights}: no state dict; write one with torch.save(model.state_dict(), FILE)")

    # Changed in place, because the dictionary's attribute _metadata tells load_state_dict which version wrote it.
    for key in list(state):  # torchvision's DenseNet files still say norm.1 for norm1
        state[re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)] = state.pop(key)

    own = model.state_dict()
    head = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    left_out = []
    misshapen = {}
    for key, shape in [(key, tensor.shape) for key, tensor in state.items()]:
        if key.startswith(("aux1.", "aux2.", "AuxLogits.")):
            left_out.append(key)
        elif key not in own or shape == own[key].shape:
            continue
        elif key in (f"{head}.weight", f"{head}.bias") and shape[1:] == own[key].shape[1:]:
            left_out.append(key)
        else:
            misshapen[key] = f"{key} {tuple(shape)} for {tuple(own[key].shape)}"
        del state[key]

    missing, unknown = model.load_state_dict(state, strict=False)
    missing = [key for key in missing if key not in left_out and key not in misshapen]
    found = {"of another shape": list(misshapen.values()), "missing": missing, "unknown": unknown}
    misfits = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in found.items()
        if keys
    ]
    if misfits:
        raise ValueError(f"model.weights={weights}: not the weights of this model.name: {', '.join(misfits)}")
    log.info("model.weights=%s: loaded; left out: %s", weights, ", ".join(left_out) or "none")
