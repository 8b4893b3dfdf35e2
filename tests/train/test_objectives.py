import torch

from headstart.train.objectives import draw_candidates, sparse_forward_kl

V, N, TOP = 200, 16, 6


def _case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    teacher = (2 * torch.randn(N, V)).log_softmax(-1)
    best = teacher.topk(TOP)
    return torch.randn(N, V), best.indices, best.values


def _reference(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL over k + 1 buckets with the full softmax."""
    q = logits.softmax(-1).gather(-1, ids)
    p = logprobs.exp()
    tail_p, tail_q = 1 - p.sum(-1), 1 - q.sum(-1)
    return (p * (logprobs - q.log())).sum(-1) + tail_p * (tail_p / tail_q).log()


def test_over_the_whole_vocabulary_the_sparse_objective_is_the_exact_one() -> None:
    logits, ids, logprobs = _case()
    loss = sparse_forward_kl(logits, torch.zeros(V), ids, logprobs)
    torch.testing.assert_close(loss, _reference(logits, ids, logprobs))


def test_negatives_stand_in_for_the_rest_of_the_vocabulary() -> None:
    """The sampled normaliser is unbiased, and its noise shrinks with the number of negatives."""
    logits, ids, _ = _case()
    exact = logits.logsumexp(-1).exp()

    def estimates(negatives: int) -> torch.Tensor:
        drawn = []
        for seed in range(400):
            c = draw_candidates(ids, V, negatives, torch.Generator().manual_seed(seed))
            assert torch.equal(c.ids[c.slots], ids)
            drawn.append((logits[:, c.ids] + c.log_weights).logsumexp(-1).exp())
        return torch.stack(drawn)

    few, many = estimates(8), estimates(64)
    assert ((many.mean(0) - exact).abs() / exact).max() < 0.02
    assert (many.std(0) < 0.5 * few.std(0)).all()


def test_the_gradient_vanishes_where_the_draft_agrees_with_the_teacher() -> None:
    _, ids, logprobs = _case()
    torch.manual_seed(0)
    logits = (2 * torch.randn(N, V)).requires_grad_()
    sparse_forward_kl(logits, torch.zeros(V), ids, logprobs).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-4
