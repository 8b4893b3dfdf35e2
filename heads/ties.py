"""Low-rank ties: what a head narrower than its target starts from.

Letters: D target width, H head width, V vocabulary, N tokens.
"""

import torch

LOGIT_ROWS = 128  # rows of V logits held at once


def low_rank_start(
    table: torch.Tensor, hidden: torch.Tensor, token_weights: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Data-aware start of the projection P of a low-rank tie `table @ P`.

    Minimises E ||(table - mean) h - (table - mean) P Q h||^2 over tokens weighted by their
    probability and hidden states h with the measured second moment: with S that moment and G the
    weighted covariance of the table, P = S^(1/2) U and Q = U' S^(-1/2), where U are the leading
    eigenvectors of S^(1/2) G S^(1/2).

    Args:
        table: [V, D] the target's table.
        hidden: [N, D] post-norm hidden states of the target.
        token_weights: [V] probability of each token, any scale.
        rank: H, columns kept.

    Returns:
        P [D, H] float32, scaled so that head states Q h have unit second moment, and Q [H, D].
    """
    weights = (token_weights / token_weights.sum()).float()
    mean = weights @ table.float()
    centred = table.float() - mean
    covariance = centred.T @ (weights[:, None] * centred)
    moment = hidden.float().T @ hidden.float() / len(hidden)
    values, vectors = torch.linalg.eigh(moment)
    # Directions that the target never takes are left out of the inverse.
    roots = values.clamp_min(1e-7 * values.max()).sqrt()
    root, inverse = (vectors * r @ vectors.T for r in (roots, 1 / roots))
    leading = torch.linalg.eigh(root @ covariance @ root)[1].flip(-1)[:, :rank]
    return root @ leading, leading.T @ inverse


def plain_svd_start(
    table: torch.Tensor, hidden: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The start from the table alone: its leading right singular vectors, to compare with.

    Args:
        table: [V, D] the target's table.
        hidden: [N, D] states, of which the scale is taken and nothing else, so that both starts
            begin with logits of the right size.
        rank: H.

    Returns:
        P [D, H] and Q [H, D] as of `low_rank_start`.
    """
    vectors = torch.linalg.eigh(table.float().T @ table.float())[1].flip(-1)[:, :rank]
    scale = (hidden.float() @ vectors).square().mean(0).sqrt()
    return vectors * scale, (vectors / scale).T


@torch.no_grad()
def low_rank_agreement(
    table: torch.Tensor, start: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor
) -> float:
    """How often `table @ P @ Q h` and `table @ h` have the same best token.

    Args:
        table: [V, D].
        start: P [D, H] and Q [H, D].
        hidden: [N, D] states of the target that the start was not made of.
    """
    agreed = 0
    for rows in hidden.float().split(LOGIT_ROWS):
        pair = (rows, rows @ start[1].T @ start[0].T)
        best, kept = ((states.to(table.dtype) @ table.T).argmax(-1) for states in pair)
        agreed += int((best == kept).sum())
    return agreed / max(len(hidden), 1)
