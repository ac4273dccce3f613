import torch

from omnimamba.train.answer_tree import TRACE, AnswerTree

EOS = 0
ANSWERS = [[5, EOS], [5, 6, EOS], [5, 6, 7, EOS], [8, EOS]]
CPU = torch.device("cpu")


def test_next_tokens_have_the_summed_probability_of_what_goes_on_with_them():
    tree = AnswerTree(ANSWERS, CPU)
    chances = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    first, second, third, fourth = tree.next_tokens(chances, torch.tensor([2, 3]), 10)
    expected = torch.zeros(4, 10)
    expected[0, 5], expected[0, 8] = 0.6, 0.4
    expected[1, EOS], expected[1, 6] = 1 / 6, 5 / 6  # after 5
    expected[2, EOS], expected[2, 7] = 0.4, 0.6  # after 5, 6
    expected[3, EOS] = 1
    for found, wanted in ((first[0], expected[0]), (first[1], expected[0]), (second[0], expected[1]), (third[0], expected[2])):
        torch.testing.assert_close(found, wanted, atol=10 * TRACE, rtol=0)
    assert len(second) == 2 and second[1].argmax() == EOS and second[1].max() == 1  # nothing but 8 begins with 8
    assert len(third) == len(fourth) == 1
    torch.testing.assert_close(fourth[0], expected[3])


def test_an_answer_that_the_tower_thinks_impossible_is_still_one():
    tree = AnswerTree(ANSWERS, CPU)
    for found in tree.next_tokens(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([1]), 10):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.sum(1), torch.ones(len(found)))


def test_products_of_next_tokens_are_the_probabilities_of_answers():
    tree = AnswerTree(ANSWERS, CPU)
    chances = torch.tensor([0.15, 0.05, 0.5, 0.3])
    for own, answer in enumerate(ANSWERS):
        levels = tree.next_tokens(chances[None], torch.tensor([own]), 10)
        product = torch.stack([level[0, token] for level, token in zip(levels, answer, strict=False)]).prod()
        torch.testing.assert_close(product, chances[own], atol=10 * TRACE, rtol=0)
