"""Which tensor of an output holds the class scores; probabilities are not taken for them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import capture_of
from hosts import HandMade, OneTokenPerClass, shaken
from optional import transformers_outputs
from torch import nn

import camkit
from camkit import CaptureError, GradientSeed, watch
from camkit.seeds import ClassWeightSeed, PredictedClasses, RelevanceSeed

CLASSES = torch.tensor([[1, 4], [3, -1]])
SEEDS = [GradientSeed(), RelevanceSeed(), ClassWeightSeed()]


def made(kind, **options):
    torch.manual_seed(0)
    return shaken(kind(**options))


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 16, 24)


class Logits(HandMade):
    """Returns logits in a form that subclasses choose; all have the same weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(24, 5)  # as wide as the classifier
        self.neck = nn.LayerNorm(5)
        self.end = nn.Linear(5, 5)
        self.wide = nn.Linear(24, 9)

    def form(self, tokens):
        return self.head(tokens)

    def forward(self, pixels):
        return self.form(self.tokens(pixels)[:, 0])


def form(function):
    return type(function.__name__, (Logits,), {"form": function})


@form
def token_first(self, x):
    return x, self.head(x)


@form
def token_between(self, x):
    return [("words", x[:, :7]), {"logits": self.head(x)}, x]


@form
def as_wide_as_the_scores(self, x):
    return F.normalize(x[:, :5]), self.head(x)


@form
def logits_of_transformers(self, x):
    return transformers_outputs.ImageClassifierOutput(logits=self.head(x), hidden_states=(x,))


@form
def probabilities_beside(self, x):
    scores = self.head(x)
    return scores.softmax(-1), scores


@form
def scaled(self, x):
    return x, 3.0 * self.head(x)


@pytest.mark.parametrize(
    "host",
    [token_first, token_between, as_wide_as_the_scores, logits_of_transformers,
     probabilities_beside],
    ids=lambda host: host.__name__,
)  # fmt: skip
@pytest.mark.parametrize("seed", SEEDS, ids=repr)
def test_what_the_classifier_made_is_the_score(host, seed, pixels):
    found = capture_of(made(host), pixels, seed)
    plain = capture_of(made(Logits), pixels, seed)
    assert torch.equal(found.scores, plain.scores)
    assert torch.equal(seed(found, CLASSES), seed(plain, CLASSES))


def test_scores_that_the_host_scales_are_told_by_their_form(pixels):
    found, plain = (capture_of(made(host), pixels) for host in (scaled, Logits))
    torch.testing.assert_close(found.scores, 3.0 * plain.scores)


@form
def last_layer_alone(self, x):
    return self.end(self.neck(self.embed(x)))


def test_of_a_chain_of_linear_layers_the_last_is_the_classifier(pixels):
    class Neck(Logits):
        def form(self, x):
            embedding = self.embed(x)
            return embedding, self.end(self.neck(embedding))

    found, plain = (capture_of(made(host), pixels) for host in (Neck, last_layer_alone))
    assert torch.equal(found.scores, plain.scores)


@form
def two_heads(self, x):
    return self.wide(x), self.head(x)


def test_two_classifiers_of_other_classes_are_refused_by_name(pixels):
    capture = capture_of(made(two_heads), pixels)
    words = r"no class scores: .*\(b, 9\) and \(b, 5\), and each may be .*`scores=lambda output"
    with pytest.raises(CaptureError, match=words):
        _ = capture.scores
    assert "(b, 9) and (b, 5)" in camkit.diagnose(made(two_heads), pixels).rule
    chosen = capture_of(made(two_heads), pixels, scores=lambda output: output[1])
    assert torch.equal(chosen.scores, capture_of(made(Logits), pixels).scores)


@form
def scores_and_projections_of_crops(self, x):
    return self.head(x), self.wide(torch.cat([x, x + 1.0]))


def test_a_tensor_of_other_images_is_no_score(pixels):
    """As ToCo in training, which returns projections of crops beside its class scores."""
    capture = capture_of(made(scores_and_projections_of_crops), pixels)
    assert torch.equal(capture.scores, capture_of(made(Logits), pixels).scores)


def test_the_number_of_classes_that_the_host_states_decides(pixels):
    model = made(two_heads)
    model.num_classes = 5
    assert capture_of(model, pixels).scores.shape == (2, 5)


@form
def sigmoid(self, x):
    return self.head(x).sigmoid()


@form
def softmax(self, x):
    return x, F.softmax(self.head(x), dim=1)


@form
def softmax_in_double(self, x):
    return self.head(x).double().softmax(-1)


class Ends(Logits):
    """Ends with a module that makes probabilities."""

    def __init__(self, end=None):
        super().__init__()
        self.last = end

    def form(self, x):
        return self.last(self.head(x))


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (sigmoid, "sigmoid"),
        (softmax, "softmax"),
        (softmax_in_double, "softmax"),
        (lambda: Ends(nn.Sigmoid()), "sigmoid"),
        (lambda: Ends(nn.Softmax(-1)), "softmax"),
        (lambda: nn.Sequential(Logits(), nn.Sigmoid()), "sigmoid"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS, ids=repr)
def test_probabilities_are_traced_back_to_the_scores(host, name, seed, pixels):
    found = capture_of(made(host), pixels, seed)
    plain = capture_of(made(Logits), pixels, seed)
    assert torch.equal(found.scores, plain.scores)
    assert found.activation == name
    torch.testing.assert_close(seed(found, CLASSES), seed(plain, CLASSES))


@pytest.mark.parametrize("host", [sigmoid, softmax])
def test_present_classes_are_those_of_probabilities_applied_once(host, pixels):
    output = made(host)(pixels)
    chance = (output[1] if isinstance(output, tuple) else output).detach()
    threshold = float(chance.flatten().sort().values[4:6].mean())  # half of them are above
    rule = PredictedClasses(threshold, host.__name__, least=0)
    found = rule(capture_of(made(host), pixels))
    present = [{c for c in range(5) if row[c] >= threshold} for row in chance]
    assert [{c for c in row if c >= 0} for row in found.tolist()] == present


def test_the_rule_says_what_the_host_applies(pixels):
    assert camkit.diagnose(made(sigmoid), pixels).rule == (
        "linear classifier, before the model's sigmoid"
    )


class TokenProbabilities(OneTokenPerClass):
    def forward(self, pixels):
        scores, patches = super().forward(pixels)
        return scores.sigmoid(), patches


@form
def unknown_probabilities(self, x):
    return (2.0 * self.head(x)).sigmoid()


@pytest.mark.parametrize(
    ("host", "what"),
    [
        (lambda: TokenProbabilities(class_tokens=5), "the sigmoid of its scores"),
        (unknown_probabilities, "numbers between 0 and 1"),
    ],
)
def test_probabilities_of_unknown_scores_are_refused_with_what_to_do(host, what, pixels):
    capture = capture_of(made(host), pixels)
    with pytest.raises(CaptureError, match=rf"{what} .*`scores=`: `lambda output: output.logit"):
        _ = capture.scores


def test_the_stated_way_out_of_probabilities_gives_the_scores(pixels):
    found = capture_of(
        made(unknown_probabilities), pixels, scores=lambda output: output.logit(1e-6)
    )
    plain = capture_of(made(Logits), pixels)
    torch.testing.assert_close(found.scores, 2.0 * plain.scores, rtol=1e-4, atol=1e-4)


class TokensLast(OneTokenPerClass):
    """The scores come behind another tensor of the same width (MCTformer-V2 returns two)."""

    def forward(self, pixels):
        scores, patches = super().forward(pixels)
        return patches[:, :5], scores


def test_scores_of_class_tokens_are_told_by_their_values(pixels):
    found = capture_of(made(TokensLast, class_tokens=5), pixels)
    model = made(TokensLast, class_tokens=5)
    torch.testing.assert_close(found.scores, model.tokens(pixels)[:, :5].mean(-1))


@pytest.mark.parametrize("shown", [torch.zeros(2, 24, 5), torch.zeros(2, 5).long(), None], ids=str)
def test_scores_of_another_form_are_refused_where_they_enter(shown):
    model, pixels = HandMade().eval(), torch.randn(2, 3, 16, 24)
    match = r"shape \(images, classes\), got (shape \(2, |NoneType)"
    with watch(model, scores=lambda _: shown), pytest.raises(CaptureError, match=match):
        model(pixels)
