"""Our VGG: torchvision's names and shapes, and what the audit says of it."""

import pytest
import torch
from torch import nn

import turnover
from turnover import InputError
from turnover.models.vgg import SITES, VGG

# From torchvision's own vgg11, vgg11_bn and vgg16.
CONVOLUTIONS = {
    (11, False): [0, 3, 6, 8, 11, 13, 16, 18],
    (11, True): [0, 4, 8, 11, 15, 18, 22, 25],
    (16, False): [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
}
PARAMETERS = {(11, False): 132_863_336, (11, True): 132_868_840, (16, False): 138_357_544}


@pytest.mark.parametrize(("depth", "batch_norm"), CONVOLUTIONS)
def test_names_and_sizes_are_those_of_torchvision(depth, batch_norm):
    with torch.device("meta"):
        model = VGG(depth, 1000, batch_norm=batch_norm, bias=True)
    found = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)]
    assert found == CONVOLUTIONS[depth, batch_norm]
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[depth, batch_norm]
    names = set(model.state_dict())
    assert {f"classifier.{i}.{kind}" for i in (0, 3, 6) for kind in ("weight", "bias")} <= names
    assert model.classifier[0].weight.shape == (4096, 25088)


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_depth_counts_the_layers_with_weights_and_small_images_run(depth):
    torch.manual_seed(0)
    model = VGG(depth, 10, size=32, width=4, hidden=16)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    network = turnover.attach(model, SITES)
    assert len(network.sites) == depth - 1
    with network.exposed([1, 2]):
        outputs = model(torch.randn(2, 3, 32, 32))
    assert outputs.shape == (2, 10) and torch.isfinite(outputs).all()
    assert network.units["features.1"] == 4 and network.units["classifier.1"] == 16


def audited(**options):
    torch.manual_seed(0)
    model = VGG(11, 5, size=32, width=8, hidden=32, **options)
    return turnover.attach(model, SITES).audit((torch.randn(4, 3, 32, 32),))


def test_nothing_leaks_where_every_parameter_belongs_to_a_unit():
    report = audited()
    assert report.clean and report.leaking_share == 0, str(report)


def test_a_bias_in_the_last_layer_and_batch_statistics_leak_and_the_audit_says_so():
    with_bias = audited(bias=True)
    assert not with_bias.clean and "classifier.6.bias" in str(with_bias)
    assert audited(batch_norm=True).buffers


def test_the_hidden_network_of_an_image_never_learns_it():
    torch.manual_seed(0)
    model = VGG(11, 5, size=32, width=8, hidden=32)
    network = turnover.attach(model, SITES)
    x, y = torch.randn(1, 3, 32, 32), torch.tensor([3])

    def losses():
        model.eval()
        with torch.no_grad():
            found = []
            for context in (network.exposed([7]), network.hidden([7])):
                with context:
                    found.append(float(nn.functional.cross_entropy(model(x), y)))
        return found

    before = losses()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(5):
        with network.exposed([7]):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = losses()
    assert after[0] < before[0] / 2
    assert after[1] == before[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((12, 10), {}), "depth must be one of 11, 13, 16, 19"),
        (((11, 0), {}), "classes must be >= 1"),
        (((11, 10), {"size": 28}), "multiple of 32"),
        (((11, 10), {"width": 0}), "width must be >= 1"),
        (((11, 10), {"dropout": 1.0}), "dropout must lie"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said):
    positional, named = arguments
    with pytest.raises(InputError, match=said):
        VGG(*positional, **named)


def test_resnet_and_vit_attach_with_the_presets_and_batch_statistics_are_named():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vit = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=3,
        )
    )
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
        )
    )
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    for model, preset, sites in ((vit, "mlp", 2), (resnet, "channels", 5)):
        network = turnover.attach(model, preset)
        assert len(network.sites) == sites
        report = network.audit({"pixel_values": images, "labels": labels})
        assert not report.clean and bool(report.buffers) is (model is resnet)
        model.eval()
        influence = turnover.Influence(network, method="exact", ghosts=100)
        batch = {"pixel_values": images[:2], "labels": labels[:2]}
        scores = influence.estimate([batch], torch.arange(6)).scores
        assert scores.shape == (2, 6) and scores.std() > 0
