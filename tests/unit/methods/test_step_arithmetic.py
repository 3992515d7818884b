"""What the methods compute in a step, against autograd, least squares and what is known in closed form."""

import math

import pytest
import torch

from gelora_plugins.errors import ConfigError
from gelora_plugins.methods.base import orthogonality_gradient
from gelora_plugins.methods.lora_pro import LoRAPro, points
from gelora_plugins.methods.rm_lora import RMLoRA


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


M, N, R, S = 7, 6, 3, 1.7


@pytest.fixture
def place():
    """A, B, the full gradient g."""
    return drawn(R, N), drawn(M, R, seed=1), drawn(M, N, seed=2)


def equivalent(a, b, g, scaling=S):
    """g~ of LoRA-Pro, from the gradients of A and B only."""
    (point,) = points([(a, b, scaling)])
    first, second = point.nearest(scaling * b.T @ g, scaling * g @ a.T)
    return scaling * (b @ first + second @ a), first, second


def projector(matrix):
    return matrix @ torch.linalg.pinv(matrix)


# LoRA-Pro. All is float64: errors are some 1e-15 times the condition of A A' and B' B, which is below 1e3 here.


def test_the_equivalent_gradient_is_two_projections(place):
    a, b, g = place
    on_b, on_a = projector(b), projector(a.T)
    expected = on_b @ g + (torch.eye(M, dtype=g.dtype) - on_b) @ g @ on_a
    found = equivalent(a, b, g)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert (found * g).sum().item() == pytest.approx(found.square().sum().item())
    (point,) = points([(a, b, S)])
    first, second = point.equivalent(S * b.T @ g, S * g @ a.T)
    torch.testing.assert_close(S * (b @ first + second @ a), expected, rtol=0, atol=1e-11)


def test_it_is_the_least_squares_solution_nearest_to_the_gradients(place):
    a, b, g = place
    # g~ = s B g_A + s g_B A is linear in (g_A, g_B); rows of the system are the entries of g, row by row.
    eye_m, eye_n = torch.eye(M, dtype=g.dtype), torch.eye(N, dtype=g.dtype)
    system = S * torch.cat([torch.kron(b, eye_n), torch.kron(eye_m, a.T.contiguous())], dim=1)
    given = torch.cat([(S * b.T @ g).flatten(), (S * g @ a.T).flatten()])
    # Of all solutions the one nearest to `given` is `given` and the smallest correction.
    inverse = torch.linalg.pinv(system)
    solution = given + inverse @ (g.flatten() - system @ given)
    found, first, second = equivalent(a, b, g)
    torch.testing.assert_close(found.flatten(), system @ solution, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.cat([first.flatten(), second.flatten()]), solution, rtol=0, atol=1e-11)
    plain = S * (b @ (S * b.T @ g) + (S * g @ a.T) @ a)
    assert (found - g).norm() < (plain - g).norm()


def test_it_depends_on_the_product_only(place):
    a, b, g = place
    turn = torch.linalg.qr(drawn(R, R, seed=3)).Q
    expected = equivalent(a, b, g)[0]
    torch.testing.assert_close(equivalent(3 * a, b / 3, g)[0], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(equivalent(turn.T @ a, b @ turn, g)[0], expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(equivalent(a, b, g, 0.1)[0], expected, rtol=0, atol=1e-11)


def test_with_identities_it_is_the_gradient_without_a_corner(place):
    g = place[2]
    a, b = torch.zeros(R, N, dtype=g.dtype), torch.zeros(M, R, dtype=g.dtype)
    a[:, :R], b[:R] = 0.3 * torch.eye(R), 2 * torch.eye(R)
    expected = g.clone()
    expected[R:, R:] = 0
    torch.testing.assert_close(equivalent(a, b, g)[0], expected, rtol=0, atol=1e-14)


def test_where_b_is_0_it_is_the_gradient_on_the_rows_of_a(place):
    a, _, g = place
    found, first, second = equivalent(a, torch.zeros(M, R, dtype=g.dtype), g)
    assert first.eq(0).all()
    torch.testing.assert_close(found, g @ projector(a.T), rtol=0, atol=1e-12)
    torch.testing.assert_close(second, g @ a.T @ torch.linalg.inv(a @ a.T) / S, rtol=0, atol=1e-12)


def test_ranks_that_do_nothing_get_no_step_out_of_rounding(place):
    a, b, g = place
    a, b = a.clone(), b.clone()
    a[2], b[:, 2] = a[0] + a[1], b[:, 0] - b[:, 1]
    found, first, second = equivalent(a, b, g)
    on_b, on_a = projector(b), projector(a.T)
    expected = on_b @ g + (torch.eye(M, dtype=g.dtype) - on_b) @ g @ on_a
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert max(first.abs().max(), second.abs().max()) < 1e3


def test_places_of_several_sizes_are_found_together(place):
    a, b, _ = place
    small = drawn(1, 4), drawn(5, 1, seed=1)
    found = points([(a, b, S), (*small, 1.0), (a + 1, b, S)])
    for point, (other_a, other_b) in zip(found, [(a, b), small, (a + 1, b)], strict=True):
        assert torch.equal(point.a, other_a)
        for values, vectors, gram in (
            (point.values_a, point.vectors_a, other_a @ other_a.T),
            (point.values_b, point.vectors_b, other_b.T @ other_b),
        ):
            torch.testing.assert_close(vectors @ torch.diag(values) @ vectors.T, gram, rtol=0, atol=1e-12)


# RM-LoRA


def norm_from_identity(rows):
    return (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype)).norm()


def test_the_regulariser_has_the_gradient_of_its_norm():
    rows = drawn(R, N).requires_grad_()
    (expected,) = torch.autograd.grad(norm_from_identity(rows), rows)
    torch.testing.assert_close(orthogonality_gradient(rows), expected, rtol=0, atol=1e-14)


def test_the_regulariser_leaves_orthonormal_rows_and_zeros():
    orthonormal = torch.linalg.qr(drawn(N, N)).Q[:R]
    assert orthogonality_gradient(orthonormal).eq(0).all()
    assert orthogonality_gradient(orthonormal.float()).eq(0).all()  # where the norm is some 1e-7 of rounding
    zeros = torch.zeros(R, N, dtype=torch.float64)
    assert norm_from_identity(zeros).item() == pytest.approx(math.sqrt(R))
    assert orthogonality_gradient(zeros).eq(0).all()


def test_the_regulariser_of_rows_of_length_two():
    # ||c² I - I|| = (c² - 1) sqrt(r), and each of r entries c has the same slope, 2 c / sqrt(r).
    rows = torch.zeros(R, N, dtype=torch.float64)
    rows[:, :R] = 2 * torch.eye(R)
    expected = torch.zeros_like(rows)
    expected[:, :R] = 4 / math.sqrt(R) * torch.eye(R, dtype=rows.dtype)
    torch.testing.assert_close(orthogonality_gradient(rows), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("share", "rank", "stay"), [(0.5, 8, 4), (0.25, 8, 2), (0.5, 3, 2), (0.01, 4, 1), (0.5, 1, 1)])
def test_so_many_ranks_stay(share, rank, stay):
    masked, _ = RMLoRA(share=share).draw("q", rank, 0, 1)
    assert len(masked) == len(set(masked.tolist())) == rank - stay
    assert set(masked.tolist()) <= set(range(rank))


def test_draws_are_those_of_seed_step_and_module():
    def draws(**changed):
        method = RMLoRA(same=changed.pop("same", True))
        return [t.tolist() for t in method.draw(**{"name": "q", "rank": 32, "seed": 0, "step": 1, **changed})]

    first = draws()
    assert first[0] == first[1]
    assert first == draws()
    assert draws(same=False)[0] == first[0] != draws(same=False)[1]
    assert first not in (draws(name="v"), draws(seed=1), draws(step=2))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (RMLoRA, {"share": 0}, "share is 0; expected a number above 0, and 1 at most"),
        (RMLoRA, {"share": 1.5}, "share is 1.5"),
        (RMLoRA, {"mask": "rows"}, "mask is 'rows'; expected one of: grad, update"),
        (RMLoRA, {"orthogonality": -1}, "orthogonality is -1; expected 0 or more"),
        (RMLoRA, {"orthogonality": math.inf}, "orthogonality is inf"),
        (LoRAPro, {"mode": "fast"}, "mode is 'fast'; expected one of: full, efficient"),
    ],
)
def test_options_that_are_not_there_are_refused(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        kind(**options)
