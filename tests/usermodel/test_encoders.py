"""Text and history encoders: e_0 + g(what is known of the user)."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from prlhf.usermodel import EncoderUserModel, HistoryUserModel, TextUserModel, UserContext

T, D, H = 2, 4, 5
KINDS = {"text": TextUserModel, "history": HistoryUserModel}
IDS = torch.tensor([0, 1, 2])


def _model(kind: str) -> EncoderUserModel:
    """Trained: every parameter off its start."""
    model = KINDS[kind](num_users=2, num_user_tokens=T, dim=D, hidden_dim=H, seed=3).double()
    model.init_(torch.ones(T, D, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


K = 3


def _mixture(kind: str) -> EncoderUserModel:
    """Of K shared soft prompts, trained."""
    model = KINDS[kind](num_users=2, num_user_tokens=T, dim=D, hidden_dim=H, num_clusters=K, seed=3).double()
    generator = torch.Generator().manual_seed(1)
    model.init_(torch.randn(K, T, D, generator=generator, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def _context(lengths: list[list[int]], *, pad_to: int = 6) -> UserContext:
    """Random texts; what stands behind their ends is random too."""
    generator = torch.Generator().manual_seed(2)
    shape = (len(lengths), len(lengths[0]), pad_to, D)
    return UserContext(torch.randn(shape, generator=generator, dtype=torch.float64), torch.tensor(lengths))


CONTEXTS = {"text": [[3], [6], [0]], "history": [[3, 6, 2, 1], [5, 2, 0, 0], [0, 0, 0, 0]]}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_context_or_with_an_empty_one_a_row_is_e_0_bitwise(kind):
    model = _model(kind)
    soft_prompts = model(IDS, _context(CONTEXTS[kind]))
    assert torch.equal(soft_prompts[2], model.generic)
    assert torch.equal(model(IDS), model.generic.expand(3, T, D))
    assert ((soft_prompts[:2] - model.generic).abs() > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_user_starts_as_the_generic_one_whatever_is_read(kind):
    model = KINDS[kind](num_users=2, num_user_tokens=T, dim=D, hidden_dim=H).double()
    model.init_(torch.ones(T, D, dtype=torch.float64))
    soft_prompts = model(IDS, _context(CONTEXTS[kind]))
    assert torch.equal(soft_prompts, torch.ones(3, T, D, dtype=torch.float64))
    soft_prompts.sum().backward()
    assert model.encoder["heads"].grad.abs().max() > 0, "the start must be one that training leaves"


@pytest.mark.parametrize("kind", KINDS)
def test_the_id_says_nothing(kind):
    model, context = _model(kind), _context(CONTEXTS[kind])
    assert torch.equal(model(torch.tensor([0, 0, 0]), context), model(torch.tensor([2, 1, 1]), context))


@pytest.mark.parametrize("kind", KINDS)
def test_pads_change_nothing(kind):
    model, context = _model(kind), _context(CONTEXTS[kind])
    wide = UserContext(F.pad(context.embeds, (0, 0, 0, 3), value=7.0), context.lengths)
    torch.testing.assert_close(model(IDS, wide), model(IDS, context), rtol=0, atol=1e-14)
    noise = UserContext(context.embeds.where(context.mask[..., None], torch.tensor(9.0).double()), context.lengths)
    assert torch.equal(model(IDS, noise), model(IDS, context))


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_the_embeddings_changes_nothing(kind):
    """Gemma's are some fifty times as large as others'."""
    model, context = _model(kind), _context(CONTEXTS[kind])
    scaled = UserContext(50 * context.embeds, context.lengths)
    torch.testing.assert_close(model(IDS, scaled), model(IDS, context), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_right_and_those_of_an_empty_context_are_zero(kind):
    model, context = _model(kind), _context(CONTEXTS[kind])
    names = [name for name, _ in model.named_parameters()]

    def soft_prompts(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (IDS, context))

    assert torch.autograd.gradcheck(soft_prompts, tuple(model.parameters()))
    empty = UserContext(context.embeds, torch.zeros_like(context.lengths))
    model(IDS, empty).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert name == "generic" or not parameter.grad.any(), name


def test_a_text_is_pooled_by_a_query_for_each_soft_token():
    """One loop over tokens in place of the batched sums."""
    model, context = _model("text"), _context([[3]])
    parameters = model.encoder
    tokens = [x / x.square().mean().sqrt() for x in context.embeds[0, 0, :3]]
    for t in range(T):
        weights = [math.exp((parameters["queries"][t] @ x).item()) for x in tokens]
        pooled = sum(weight * x for weight, x in zip(weights, tokens, strict=True)) / sum(weights)
        hidden = torch.tanh(parameters["layer"] @ pooled + parameters["bias"][t])
        expected = model.generic[t] + hidden @ parameters["heads"][t]
        torch.testing.assert_close(model(torch.tensor([1]), context)[0, t], expected)


def test_a_history_is_the_mean_vote_of_its_pairs():
    """One loop over pairs; two votes are divided by three."""
    model, context = _model("history"), _context([[3, 6, 2, 1]])
    parameters = model.encoder

    def response(place: int) -> torch.Tensor:
        length = int(context.lengths[0, place])
        tokens = [x / x.square().mean().sqrt() for x in context.embeds[0, place, :length]]
        mean = sum(F.gelu(parameters["tokens"] @ x) for x in tokens) / length
        return torch.cat([mean, torch.tensor([math.log(length)], dtype=torch.float64)])

    votes = [torch.tanh(parameters["votes"] @ (response(i) - response(i + 1))) for i in (0, 2)]
    hidden = torch.tanh(parameters["layer"] @ (votes[0] + votes[1]) / 3)
    for t in range(T):
        expected = model.generic[t] + hidden @ parameters["heads"][t]
        torch.testing.assert_close(model(torch.tensor([1]), context)[0, t], expected)


def test_the_order_of_the_pairs_means_nothing_and_that_within_a_pair_does():
    model, context = _model("history"), _context([[3, 6, 2, 1, 5, 4]])
    one = torch.tensor([1])

    def ordered(places: list[int]) -> torch.Tensor:
        return model(one, UserContext(context.embeds[:, places], context.lengths[:, places]))

    # 1e-6: a sum in another order.
    assert (ordered([4, 5, 0, 1, 2, 3]) - ordered([0, 1, 2, 3, 4, 5])).abs().max() < 1e-6
    assert (ordered([1, 0, 3, 2, 5, 4]) - ordered([0, 1, 2, 3, 4, 5])).abs().max() > 1e-2


def test_with_all_labels_swapped_a_history_is_the_opposite_user():
    model, context = _model("history"), _context([[3, 6, 2, 1]])
    swapped = UserContext(context.embeds[:, [1, 0, 3, 2]], context.lengths[:, [1, 0, 3, 2]])
    torch.testing.assert_close(model.read(swapped), -model.read(context), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_known_users_starts_white(kind):
    """200 users in two batches, whose texts share far more than what tells them apart."""
    model = KINDS[kind](num_users=2, num_user_tokens=T, dim=D, hidden_dim=3, seed=3).double()
    model.smallest_deviation = 1e-3
    model.init_(torch.zeros(T, D, dtype=torch.float64))
    generator = torch.Generator().manual_seed(4)
    shape = (200, len(CONTEXTS[kind][0]), 6, D)
    embeds = torch.randn(shape, generator=generator, dtype=torch.float64) + 3 * torch.arange(1.0, 1 + D).double()
    lengths = torch.randint(1, 7, shape[:2], generator=generator)
    model.whiten_(UserContext(embeds[rows], lengths[rows]) for rows in (slice(0, 64), slice(64, 200)))
    context = UserContext(embeds, lengths)
    hidden = model.features(model._tokens(context), context) @ model.encoder["layer"].T
    if kind == "text":
        hidden = hidden + model.encoder["bias"]
        assert hidden.mean(dim=0).abs().max() < 1e-10
    samples = hidden.detach().flatten(0, 1)
    torch.testing.assert_close(samples.T @ samples / len(samples), torch.eye(3).double(), rtol=0, atol=1e-4)


def test_whitening_leaves_out_who_says_nothing_and_directions_in_which_nobody_differs():
    model = TextUserModel(num_users=2, num_user_tokens=T, dim=D, hidden_dim=H, seed=3)
    model.init_(torch.zeros(T, D))
    drawn = model.encoder["layer"].detach().clone()
    model.whiten_([UserContext(torch.ones(2, 1, 3, D), torch.tensor([[3], [0]]))])
    assert torch.equal(model.encoder["layer"], drawn), "one text tells nothing apart"
    two = torch.ones(3, 1, 1, D)
    two[0] = torch.tensor([1.0, -1.0, 1.0, 1.0])
    model.whiten_([UserContext(two, torch.tensor([[1], [1], [0]]))])
    layer = model.encoder["layer"]
    assert torch.isfinite(layer).all() and torch.equal(layer[1:], drawn[1:])
    assert not torch.equal(layer[0], drawn[0])


def test_votes_start_white_only_where_users_differ_much(monkeypatch):
    """Deviations of 1, 0.5 and 0.05: the last is chance, and its direction stays as drawn."""
    model = HistoryUserModel(num_users=2, num_user_tokens=T, dim=D, hidden_dim=3, seed=3)
    model.init_(torch.zeros(T, D))
    drawn = model.encoder["layer"].detach().clone()
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    monkeypatch.setattr(model, "features", lambda tokens, context: (signs * torch.tensor([1.0, 0.5, 0.05]))[:, None])
    model.whiten_([UserContext(torch.ones(8, 2, 1, D), torch.ones(8, 2, dtype=torch.int64))])
    layer = model.encoder["layer"]
    torch.testing.assert_close(layer[:2].abs(), torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), rtol=0, atol=1e-5)
    assert torch.equal(layer[2], drawn[2])


def test_one_text_of_all_users_tells_nothing_apart_however_it_is_padded():
    model = TextUserModel(num_users=2, num_user_tokens=T, dim=D, hidden_dim=H, seed=3)
    model.init_(torch.zeros(T, D))
    drawn = model.encoder["layer"].detach().clone()
    text = torch.randn(1, 1, 20, D, generator=torch.Generator().manual_seed(1))
    contexts = []
    for number, length in ((7, 20), (5, 33), (3, 27)):
        embeds = F.pad(text, (0, 0, 0, length - 20)).expand(number, -1, -1, -1)
        contexts.append(UserContext(embeds, torch.full((number, 1), 20)))
    model.whiten_(contexts)
    assert torch.equal(model.encoder["layer"], drawn)


def test_whitening_seeds_no_gpu(monkeypatch):
    """Ranks have GPU seeds of their own, for dropout."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeded"))
    model = TextUserModel(num_users=2, num_user_tokens=T, dim=D, hidden_dim=H, seed=3)
    model.init_(torch.zeros(T, D))
    before = torch.get_rng_state()
    embeds = torch.randn(9, 1, 3, D, generator=torch.Generator().manual_seed(0))
    model.whiten_([UserContext(embeds, torch.full((9, 1), 3))])
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_the_layers_depend_on_the_seed_alone():
    def layers(seed: int) -> torch.Tensor:
        model = TextUserModel(num_users=1, num_user_tokens=T, dim=D, seed=seed)
        model.init_(torch.zeros(T, D))
        return model.encoder["queries"].detach()

    assert torch.equal(layers(0), layers(0)) and not torch.equal(layers(0), layers(1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_one_of_the_shared_soft_prompts_and_starts_as_the_even_one(kind):
    model = KINDS[kind](num_users=2, num_user_tokens=T, dim=D, hidden_dim=H, num_clusters=K).double()
    initial = torch.randn(K, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.init_(initial)
    context = _context(CONTEXTS[kind])
    even = initial.mean(dim=0).expand(3, T, D)
    torch.testing.assert_close(model(IDS, context), even)
    (model(IDS, context) * torch.arange(1.0, 1 + D)).sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {"basis", "encoder.heads", "encoder.generic"}
    assert model.encoder["heads"].grad.abs().max() > 0, "the start must be one that training leaves"
    with torch.no_grad():
        model.encoder["generic"].copy_(torch.tensor([0.0, 80.0, 0.0]))
    torch.testing.assert_close(model(IDS), initial[1].expand(3, T, D))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_weighed_by_what_is_read(kind):
    """The sum over soft tokens of what an encoder of offsets reads, in place of its own."""
    model, context = _mixture(kind), _context(CONTEXTS[kind])
    soft_prompts = model(IDS, context)
    generic = model.encoder["generic"]
    assert torch.equal(soft_prompts[2], model(IDS)[2]), "nothing is known of the third"
    offsets = KINDS[kind](num_users=2, num_user_tokens=T, dim=D, hidden_dim=H).double()
    with torch.no_grad():
        for name in model.encoder.keys() - {"heads", "generic"}:
            offsets.encoder[name].copy_(model.encoder[name])
        offsets.encoder["heads"][..., :K].copy_(model.encoder["heads"].expand(T, H, K))
    weights = generic + offsets.read(context)[..., :K].sum(dim=1) / math.sqrt(T)
    expected = torch.stack([
        sum(share * prompt for share, prompt in zip(row.softmax(0), model.basis, strict=True)) for row in weights
    ])
    torch.testing.assert_close(soft_prompts, expected)
    assert (soft_prompts[0] - soft_prompts[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_mixture_are_right(kind):
    model, context = _mixture(kind), _context(CONTEXTS[kind])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def soft_prompts(*parameters):
        return torch.func.functional_call(model, dict(zip(trained, parameters, strict=True)), (IDS, context))

    assert torch.autograd.gradcheck(soft_prompts, tuple(trained.values()))
