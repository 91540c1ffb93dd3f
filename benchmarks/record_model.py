"""The `model` section of record_parity: logits, losses and gradients of the record's model and of ours, by value."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import model as ours_module
from configs.speedrun import speedrun
from kernels.cross_entropy import AuxLossWeights
from model import GPT, HASH, Rotary, Smear, offset_keys

TOKENS, START = 128, 255
DOCUMENTS = (0, 37, 50, 104)
"""First tokens of the documents in the row; document 50 is long enough for every window."""


class Case(SimpleNamespace):
    """One comparison: attention windows of the record (so many keys before one's own), weights of the losses."""


STAGES = {
    "stage 1": Case(short=8, long=24, grown=(), mtp=(1.0, 0.5, 0.2), prefix=0.25),
    "stage 2": Case(short=24, long=56, grown=(56,), mtp=(1.0, 0.3), prefix=0.1),
    "stage 3": Case(short=40, long=88, grown=(56, 88), mtp=(1.0,), prefix=0.0),
    "validation": Case(short=48, long=120, grown=(56, 88, 104), mtp=(1.0,), prefix=0.0),
}
FIRST_LONG = 24
SKIP_ROW = 28  # of the record's second gate network


def model_section(record: SimpleNamespace) -> list[dict]:
    """Return a row for each stage: the relative differences of logits, loss and all gradients together; the largest one of a
    tensor's gradient, and of tensors of one or two numbers, whose gradients are sums that cancel."""
    rows = []
    for label, case in STAGES.items():
        theirs, ours = record_model(record, case), our_model(record)
        copy_weights(theirs, ours)
        tokens, targets, prefix = inputs(record)
        ours.prefix_of.copy_(prefix)
        theirs.prefix_table.copy_(prefix)
        their_logits, their_loss, their_grads = run_record(record, theirs, case, tokens, targets)
        our_logits, our_loss, our_grads = run_ours(ours, case, tokens, targets)
        gradients = renamed(their_grads, ours, skip=1 / theirs.scalars[23].detach().sigmoid())
        # The record has one scale for both networks of gates.
        our_grads["token_gates.0.network.scale"] += our_grads.pop("token_gates.4.network.scale")
        apart = {name: distance(our_grads[name], gradients[name]) for name in our_grads}
        tensors, scalars = ([name for name in apart if (our_grads[name].numel() > 2) == several]
                            for several in (True, False))
        worst = max(tensors, key=apart.get)
        together = distance(*(torch.cat([grads[name].flatten() for name in apart]) for grads in (our_grads, gradients)))
        rows.append({"case": label, "logits": distance(our_logits, their_logits),
                     "loss": distance(our_loss, their_loss), "gradients": together, "worst": apart[worst], "of": worst,
                     "scalars": max(apart[name] for name in scalars)})
    return rows


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Return |ours - theirs| / |theirs|, Euclidean norms in float64."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()


def inputs(record: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (T,) with document starts at DOCUMENTS, the targets, and a table of prefixes, -1 for a third of them."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = record.vocab_tokens
    tokens = torch.randint(0, START, (TOKENS + 1,), generator=generator)
    tokens[list(DOCUMENTS)] = START
    prefix = torch.randint(0, vocabulary, (vocabulary,), generator=generator)
    prefix[torch.rand(vocabulary, generator=generator) < 1 / 3] = -1
    return tokens[:-1], tokens[1:], prefix


# ---- The record's model -------------------------------------------------------------------------------------------------


def record_model(record: SimpleNamespace, case: Case) -> nn.Module:
    """Return the record's model with weights that are nowhere zero, its YaRN grown as in the case."""
    torch.manual_seed(0)
    model = record.new_model(TOKENS)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    for old, new in zip((FIRST_LONG, *case.grown), case.grown, strict=False):
        model.yarn.apply(old, new)
        model.yarn_paired_head.apply(old, new)
    return model


def run_record(record: SimpleNamespace, model: nn.Module, case: Case, tokens: Tensor, targets: Tensor) -> tuple:
    """Return logits before the softcap (T, V), the summed loss and the gradients by name of the record's model."""
    lengths = torch.tensor([*DOCUMENTS, TOKENS, TOKENS], dtype=torch.int32)
    arguments = record.ForwardScheduleConfig(mtp_weights=torch.tensor(case.mtp), prefix_weight=torch.tensor([case.prefix]),
                                             ws_short=case.short, ws_long=case.long, train_max_seq_len=TOKENS)
    seen: dict[str, Tensor] = {}
    loss_kernel = record.FusedSoftcappedCrossEntropy
    apply = loss_kernel.apply

    def keep_logits(x: Tensor, *rest: object) -> Tensor:
        seen["logits"] = (x @ rest[4]).detach()
        return apply(x, *rest)

    loss_kernel.apply = staticmethod(keep_logits)
    try:
        losses = model.train()(tokens.int(), targets, lengths, bigram_rows(record, tokens), arguments)
    finally:
        loss_kernel.apply = staticmethod(apply)
    loss = losses.sum()
    loss.backward()
    return seen["logits"], loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def bigram_rows(record: SimpleNamespace, tokens: Tensor) -> Tensor:
    """Return the record's rows of the bigram table, but that of the second token as ours: the record hashes the number of
    the reserved row there in place of the first token."""
    rows = record.get_bigram_hash(tokens)
    rows[1] = (HASH[0] * tokens[1] ^ HASH[1] * tokens[0]) % (record.bigram_buckets - 1)
    return rows


# ---- Ours ---------------------------------------------------------------------------------------------------------------


def our_model(record: SimpleNamespace) -> GPT:
    """Return our model of `speedrun` at the record's reduced width, with what the page names switched to the record's."""
    dim, heads = record.dim, 6
    config = replace(speedrun().model, dim=dim, head_dim=dim // heads, bigram_buckets=record.bigram_buckets,
                     matrix_dtype="float32", table_dtype="float32", embed_dtype="float32", head_dtype="float32",
                     yarn_windows=(24, 56, 88, 104), vocab_multiple=1, fp8="none", fp8_scales="dynamic", fp8_grad_max=0.0)
    model = GPT(config, vocab_size=record.vocab_tokens, max_tokens=TOKENS, document_start=START,
                prefix_of=[-1] * record.vocab_tokens)
    # The record's smear, hashes and key offset cross document starts; ours stay within a document.
    model.smear.forward = lambda x, starts: Smear.forward(model.smear, x, None)
    for ngrams in model.ngrams:
        ngrams.forward = lambda tokens, starts, ngrams=ngrams: type(ngrams).forward(ngrams, tokens, None)
    for block in model.blocks:
        if block.attention is not None and block.attention.paired:
            rotary = block.attention.rotary
            rotary.forward = lambda x, window, rotary=rotary: rotate_pairs(rotary, x, window)
    return model


def rotate_pairs(rotary: Rotary, x_BTHD: Tensor, window: int | None) -> Tensor:
    """Rotate paired heads (B, 2T, H/2, D) by the record's positions: head h of token t stands at 2 t + h mod 2, although the
    heads h < H/2 come before the others in the doubled sequence."""
    _, length, half, dim = x_BTHD.shape
    place, pair = torch.arange(length), torch.arange(half)
    position = 2 * (place // 2)[:, None] + (pair + half * (place % 2)[:, None]) % 2
    # Rotate a copy of each head at each of its two possible positions, and take the right one.
    heads = x_BTHD.new_zeros(1, length, half, dim)
    for shift in (-1, 0, 1):
        moved = Rotary.forward(rotary, x_BTHD.roll(shift, dims=1), window).roll(-shift, dims=1)
        heads = torch.where((position == (place + shift)[:, None])[..., None], moved, heads)
    return heads


def run_ours(model: GPT, case: Case, tokens: Tensor, targets: Tensor) -> tuple:
    """Return the same as `run_record`, of our model."""
    windows = {"window": case.short + 1, "long_window": case.long + 1}  # the record's do not count one's own key
    weights = AuxLossWeights.of(case.mtp[1:], case.prefix, torch.device("cpu"))
    crossing = ours_module.offset_keys
    ours_module.offset_keys = lambda k, unrotated, starts: offset_keys(k, unrotated, None)
    heads: list[Tensor] = []
    head = model.head.register_forward_hook(lambda _module, _inputs, z: heads.append(z.detach().reshape(TOKENS, -1)))
    try:
        loss = model(tokens[None], targets[None], aux_weights=weights, **windows)
        loss.backward()
    finally:
        ours_module.offset_keys = crossing
        head.remove()
    return heads[0], loss.detach(), {name: p.grad for name, p in model.named_parameters()}


# ---- Weights ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: GPT) -> None:
    """Copy the record's weights, and its table of signs, into our model."""
    ours.ngrams[0].signs.copy_(theirs.bigram_sign_table)
    values = renamed({name: p.detach() for name, p in theirs.named_parameters()}, ours, skip=theirs.scalars[23].sigmoid())
    for name, param in ours.named_parameters():
        param.copy_(values[name])


def renamed(theirs: dict[str, Tensor], ours: GPT, *, skip: Tensor) -> dict[str, Tensor]:
    """Return the record's weights, or their gradients, under our names and in our layout. The record multiplies the gate of
    the skip by a learned factor, our gate contains it: `skip` is the factor, or for gradients its inverse."""
    dim, heads = ours.config.dim, 6
    scalars, resid, post = theirs["scalars"], theirs["resid_lambdas"], theirs["post_lambdas"]
    values = {"embed": theirs["embed.weight"], "head.weight": theirs["lm_head.weight"].T,
              "ngrams.0.table": theirs["bigram_embed.weight"], "smear.gate": theirs["smear_gate.weight"],
              "smear.strength": scalars[22:23]}
    values |= {f"value_embeds.{i}": table for i, table in enumerate(theirs["value_embeds"].chunk(5))}
    order = rotary_order(dim // heads, heads)
    query_key = theirs["qk_bank"][:60].view(10, 2, dim, dim)
    for layer in range(11):
        block = f"blocks.{layer}."
        values |= {f"{block}mlp.up.weight": theirs["mlp_bank"][layer, 0],
                   f"{block}mlp.down.weight": theirs["mlp_bank"][layer, 1].T,
                   f"{block}add2.weight": torch.stack((resid[layer, 1], post[layer, 1]))}
        if layer == 6:
            continue
        index = layer - (layer > 6)
        value, out = theirs["vo_bank"][2 * index:2 * index + 2]
        values |= {f"{block}attention.q.weight": query_key[index, 0][order],
                   f"{block}attention.k.weight": query_key[index, 1][order],
                   f"{block}attention.v.weight": value, f"{block}attention.out.weight": out,
                   f"{block}attention.gains": scalars[2 * layer:2 * layer + 2],
                   f"{block}add1.weight": torch.stack((resid[layer, 0], post[layer, 0]))}
    for i, layer in enumerate((1, 2, 8, 9)):
        values[f"blocks.{layer}.attention.mix_value.weight"] = theirs["ve_gate_bank"][i]
    for i, layer in enumerate((10, 11)):
        count = (14, 5)[i]
        values |= {f"streams.inputs.{layer}.network.{name}": theirs[f"mudd_{key}"][i][:size] for name, key, size in (
            ("up", "w1", None), ("down", "w2", count), ("bias", "b2", count))}
    for i, first in enumerate((0, 4)):
        rows, network = gate_rows(ours, first), f"token_gates.{first}.network."
        factor = torch.where(torch.tensor(rows) == SKIP_ROW, skip, 1.0) if first else torch.ones(len(rows))
        values |= {f"{network}up": theirs["mudd_gate_w1"][i],
                   f"{network}down": theirs["mudd_gate_w2"][i][rows] * factor[:, None],
                   f"{network}bias": theirs["mudd_gate_b2"][i][rows] * factor, f"{network}scale": theirs["_mudd_gate_scale"]}
    return {name: values[name] for name, _ in ours.named_parameters()}


def rotary_order(head_dim: int, heads: int) -> Tensor:
    """Return, for each of our rows of queries or keys, the record's row: its rotated pairs are adjacent entries of the first
    half of a head, ours lie half a head apart."""
    half, quarter = head_dim // 2, head_dim // 4
    still = torch.arange(half, head_dim)
    first = torch.cat((torch.arange(0, half, 2), still[:quarter]))
    second = torch.cat((torch.arange(1, half, 2), still[quarter:]))
    return (torch.cat((first, second)) + head_dim * torch.arange(heads)[:, None]).flatten()


def gate_rows(ours: GPT, first: int) -> list[int]:
    """Return the record's row of each coefficient of TokenGates."""
    places = ({(1, "xsa"): 0, (3, "xsa"): 6, (3, "head"): 12, **{(layer, "inject"): 18 + 2 * layer for layer in range(4)}},
              {(4, "xsa"): 0, (7, "xsa"): 6, (10, "head"): 12, (6, "skip"): SKIP_ROW, (10, "dynamic"): 29,
               **{(layer, "inject"): 18 + 2 * i for i, layer in enumerate((4, 5, 7, 8, 9))}})[first > 0]
    rows = []
    for layer, of_layer in ours.token_gates[str(first)].starts.items():
        for name, starts in of_layer.items():
            rows += range(places[layer, name], places[layer, name] + len(starts))
    return rows
