import pytest
from torch import nn

from cifar.models import check_sizes
from cifar.models.mlp import MLP
from cifar.models.net import Net
from cifar.models.speednet import SpeedNet


def test_networks_that_pool_all_places_take_smaller_images() -> None:
    model = SpeedNet((3, 32, 32), 10, widths=[4, 4]).train()
    statistics = model.groups[0].norm1.running_mean.clone()
    check_sizes(model, 3, [16, 24, 16])
    assert model.training
    assert (model.groups[0].norm1.running_mean == statistics).all()


@pytest.mark.parametrize("model", [Net((3, 32, 32), 10), MLP((3, 32, 32), 10), SpeedNet((3, 32, 32), 10)])
def test_a_network_that_cannot_take_a_size_is_refused(model: nn.Module) -> None:
    expected = rf"^data.first_sizes: {type(model).__name__} can't take images of 4 x 4 \(.+\); leave it empty"
    with pytest.raises(ValueError, match=expected):
        check_sizes(model, 3, [32, 4])
    check_sizes(model, 3, [32])
