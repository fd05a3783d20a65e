"""Class names and the outputs behind them."""

import math

import pytest
import torch

from camkit.vocabulary import Vocabulary

IMAGENET = Vocabulary(("tabby, tabby cat", "crane", "crane, lifting machine", "tiger cat", "crane"))
ANIMALS = Vocabulary(("cat", "dog"), members=((0, 3), (1,)))


@pytest.mark.parametrize("name", ["tabby", "Tabby Cat", " tabby, tabby cat ", 0])
def test_a_class_is_found_by_whole_name_synonym_or_index(name):
    assert IMAGENET.index(name) == 0


def test_a_whole_name_goes_before_a_synonym():
    assert Vocabulary(("bird, crane", "crane")).index("crane") == 1


def test_an_ambiguous_name_lists_what_it_could_mean():
    with pytest.raises(ValueError, match='"Crane" names 2 classes: 1 "crane", 4 "crane"; use an'):
        IMAGENET.index("Crane")


def test_an_ambiguous_synonym_lists_what_it_could_mean():
    birds = Vocabulary(("crane, bird", "crane, machine"))
    with pytest.raises(ValueError, match='2 classes: 0 "crane, bird", 1 "crane, machine"'):
        birds.index("crane")


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(ValueError, match='no class is called "tiger kat"; did you mean "tiger ca'):
        IMAGENET.index("tiger kat")


def test_a_name_like_no_other_is_answered_with_examples():
    with pytest.raises(ValueError, match='"zzz"; there are 2, such as cat, dog'):
        ANIMALS.index("zzz")


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(ValueError, match=f"must lie in 0 to 1, got {index}"):
        ANIMALS.index(index)


def test_several_classes_keep_their_order():
    assert ANIMALS.resolve(["dog", 0]) == (1, 0)


def test_no_class_is_refused():
    with pytest.raises(ValueError, match="at least one class, got none"):
        ANIMALS.resolve([])


def test_a_class_named_twice_is_refused():
    with pytest.raises(ValueError, match="'Cat' and 0 are the same class, 0 \"cat\"; name each"):
        ANIMALS.resolve(["dog", "Cat", 0])


def test_a_score_is_the_log_of_the_summed_softmax_mass_up_to_a_constant():
    outputs = torch.tensor([[math.log(1.0), math.log(2.0), math.log(9.0), math.log(3.0)]])
    known = torch.tensor([[math.log(4.0), math.log(2.0)]])
    torch.testing.assert_close(ANIMALS.score(outputs), known)


def test_classes_of_one_output_and_of_several_keep_their_places():
    members = ((3,), (0, 2), (1,), (4, 0, 1), (2,))
    outputs = torch.randn(2, 3, 5)
    wanted = [outputs[..., list(member)].exp().sum(-1).log() for member in members]
    found = Vocabulary(tuple("abcde"), members).score(outputs)
    torch.testing.assert_close(found, torch.stack(wanted, -1))


def test_without_members_the_scores_are_the_outputs():
    outputs = torch.randn(2, 3, 5)
    assert torch.equal(IMAGENET.score(outputs), outputs)


def test_the_gradient_of_a_score_is_right():
    outputs = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ANIMALS.score, outputs)


def test_outputs_that_lack_a_member_are_refused():
    with pytest.raises(ValueError, match="at least 4 scores, as output 3 is a member, got 3"):
        ANIMALS.score(torch.zeros(1, 3))


@pytest.mark.parametrize("count", [4, 1000])
def test_outputs_that_do_not_fit_the_names_are_refused(count):
    with pytest.raises(ValueError, match=f"each of the 5 names, got {count}; give `members`"):
        IMAGENET.score(torch.zeros(1, count))


def test_the_length_is_the_number_of_classes():
    assert len(IMAGENET) == 5


@pytest.mark.parametrize("names", [(), ("cat", " ")])
def test_missing_names_are_refused(names):
    with pytest.raises(ValueError, match="at least one name, and no name may be blank"):
        Vocabulary(names)


def test_members_must_fit_the_names():
    with pytest.raises(ValueError, match="each of the 2 names, got 1"):
        Vocabulary(("cat", "dog"), members=((0,),))


@pytest.mark.parametrize("member", [(), (-1,), (2, 2)])
def test_members_must_be_distinct_outputs(member):
    with pytest.raises(ValueError, match='`members` of "dog" must be outputs from 0'):
        Vocabulary(("cat", "dog"), members=((0,), member))
