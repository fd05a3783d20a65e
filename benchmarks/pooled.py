"""Which seed for a classifier of pooled patches? One is trained here, on frozen features.

    CAMKIT_DATA=folder python benchmarks/pooled.py --limit 60

ViT-Ti with its ImageNet weights, whose patches are averaged instead of reading the class token; a
linear layer behind them learns the classes of `train` from image-level labels, by logistic
regression. No mask is used for that. Then seeds are compared as in gains.py: background scores from
the first images of `train`, figures from those of `val`.
"""

from dataclasses import replace

import timm
import torch
from tables import CHAIN, CLASSES, found_data, measure, table_options, write
from torch import Tensor, nn

import camkit
from camkit.bench import Variant
from camkit.cli.models import DEFAULT_MODEL, OpenedModel, open_model
from camkit.data import open_dataset
from camkit.screen import progress

PENALTY = 1e-3  # on squared weights


def features(opened: OpenedModel) -> tuple[Tensor, Tensor]:
    """What the pooling gives for each image of `train`, and which classes are in it."""
    dataset = open_dataset(found_data() / "voc12_animals")
    wanted = [dataset.classes.index(name) for name in CLASSES]
    pooled, labels = [], []
    for sample in progress(dataset.split("train"), desc="features", unit="image"):
        with torch.inference_mode():
            pooled.append(opened.model(opened.photos.load(sample.photo).pixels)[0])
        labels.append(torch.tensor([index in sample.classes for index in wanted]))
    return torch.stack(pooled).clone(), torch.stack(labels).float()


def trained(pooled: Tensor, labels: Tensor) -> nn.Linear:
    """Logistic regression of each class by L-BFGS."""
    layer = nn.Linear(pooled.shape[1], labels.shape[1])
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    rule = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        rule.zero_grad()
        wrong = nn.functional.binary_cross_entropy_with_logits(layer(pooled), labels)
        total = wrong + PENALTY * layer.weight.square().sum()
        total.backward()
        return total

    rule.step(loss)
    return layer


def pooled_model(opened: OpenedModel) -> OpenedModel:
    """The default model with a classifier of the mean of its patches."""
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, global_pool="avg", fc_norm=False,
        dynamic_img_size=True,
    ).eval()  # fmt: skip
    weights = opened.model.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    bare = replace(opened, model=model)
    pooled, labels = features(bare)
    model.head = trained(pooled, labels)
    right = (model.head(pooled) > 0).eq(labels > 0).float().mean()
    print(f"{right:.1%} of the labels of train are told")
    model.eval().requires_grad_(requires_grad=False)
    return replace(bare, vocabulary=camkit.Vocabulary(tuple(CLASSES)))


def lines() -> list[Variant]:
    found: list[Variant] = []
    for name, seed in {
        "gradient": camkit.GradientSeed(),
        "rollout": camkit.seeds.RelevanceSeed(),
        "class weight": camkit.seeds.ClassWeightSeed(),
    }.items():
        alone = Variant(name, camkit.Method(seed, refine=()), base=found[0] if found else None)
        found.append(alone)
        base = found[1] if len(found) > 1 else alone
        found.append(Variant(f"{name}, refined", camkit.Method(seed, refine=CHAIN), base=base))
    return found


def main() -> None:
    options = table_options(__doc__).parse_args()
    torch.set_num_threads(1)
    opened = pooled_model(open_model(DEFAULT_MODEL))
    report = measure(lines(), options, opened=opened).report
    write(report, options, "pooled")


if __name__ == "__main__":
    main()
