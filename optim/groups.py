"""From the model's roles to groups of tensors that are trained alike: an exact cover, or an error that lists the strays."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from torch import Tensor

from configs.by_name import number_of, parse_by_name, strays
from configs.groups import EVERY_RULE_READS, Group, Optim, acting_fields
from configs.refuse import refuse
from optim.clip import Clip
from optim.norms import Scope
from optim.rules import Rule, build_rule
from optim.step import Step, coarsest

SHOWN_IF_SET = ("constraint", "radial_brake", "row_floor", "update_every", "sparse_rows", "lr_factors", "blocks")


class Kind(NamedTuple):
    """What sets a tensor apart within its group."""

    axis: int = -1
    """The dimension that is the model's, -1 or -2: what constraints on vectors act along."""
    blocks: int = 1
    """Matrices that it is cut into, by rows."""
    lr_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Tensors of one role, their configuration and the rule built from it."""

    role: str
    config: Group
    rule: Rule
    step: Step
    params: dict[str, Tensor]
    kinds: dict[str, Kind]

    @property
    def clip(self) -> Clip | None:
        """The ball that its gradients are projected onto, if any."""
        return Clip.build(self.config)

    @property
    def scope(self) -> Scope:
        """How finely its tensors may be cut: the coarsest of what rule, constraint and clipping need."""
        steps = (self.step_for(kind).scope for kind in self.kinds.values())
        sent = "row" if self.config.sparse_rows else "element"
        return coarsest(self.rule.scope, self.clip.scope if self.clip else "element", sent, *steps)

    def step_for(self, kind: Kind) -> Step:
        """The step of its tensors of a kind."""
        return replace(self.step.along(kind.axis), peak_lr=self.step.peak_lr * kind.lr_factor)

    @property
    def elements(self) -> int:
        """Numbers in all its tensors."""
        return sum(param.numel() for param in self.params.values())


def build_groups(params: Mapping[str, Tensor], roles: Mapping[str, str], optim: Optim,
                 axes: Mapping[str, int] | None = None) -> list[ParamGroup]:
    """Groups in the order of Optim's fields; `roles` maps every parameter name to one of them; `axes` names the model
    dimension where it is not the last.

    Raises ValueError listing parameters without a role, roles without a parameter, and unknown roles.
    """
    known = [f.name for f in fields(optim)]
    without = sorted(set(params) ^ set(roles))
    unknown = sorted(f"{name}: {role}" for name, role in roles.items() if role not in known)
    if without or unknown:
        raise ValueError(f"roles must cover the parameters exactly; strays: {without}, unknown roles: {unknown}, "
                         f"known roles: {known}")
    groups = []
    for role in known:
        members = {name: param for name, param in params.items() if roles[name] == role}
        if members:
            config = getattr(optim, role)
            groups.append(ParamGroup(role, config, build_rule(config), Step.build(config), members,
                                     kinds_of(role, config, members, axes or {})))
            refuse(config.sparse_rows and groups[-1].scope == "matrix",
                   f"optim.{role}.sparse_rows: rule {config.rule}, as it is configured, updates whole matrices; rule adam "
                   "or norm row would do")
            refuse(bool(config.blocks) and groups[-1].scope != "matrix",
                   f"optim.{role}.blocks has no effect on rule {config.rule}, as it is configured: it updates each "
                   f"{groups[-1].scope} alone")
    return groups


def kinds_of(role: str, config: Group, members: Mapping[str, Tensor], axes: Mapping[str, int]) -> dict[str, Kind]:
    """The kind of every tensor of a role. Raises ValueError for names of none, and blocks that do not divide."""
    factors, blocks = parse_by_name(config.lr_factors), parse_by_name(config.blocks)
    for field, numbers in (("lr_factors", factors), ("blocks", blocks)):
        refuse(bool(unknown := strays(numbers, members)),
               f"optim.{role}.{field}: no tensor of the role has {unknown[:1]} in its name; they are {', '.join(members)}")
    kinds = {name: Kind(axes.get(name, -1), int(number_of(name, blocks, 1)), number_of(name, factors, 1.0))
             for name in members}
    for name, kind in kinds.items():
        rows = members[name].size(0) if members[name].ndim else 1
        refuse(rows % kind.blocks != 0, f"optim.{role}.blocks: {kind.blocks} does not divide the {rows} rows of {name}")
    return kinds


def group_table(groups: list[ParamGroup]) -> str:
    """One line a group: role, tensors, parameters, rule and the settings that act on it."""
    rows = [("role", "tensors", "parameters", "rule", "lr", "decay", "settings")]
    for group in groups:
        decay = f"{group.config.weight_decay:g} {group.config.decay}" if group.config.weight_decay else "none"
        rows.append((group.role, str(len(group.params)), f"{group.elements:,}", group.config.rule, f"{group.config.lr:g}",
                     decay, _settings(group.config)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _settings(config: Group) -> str:
    names = [f.name for f in fields(config) if f.name in acting_fields(config) - EVERY_RULE_READS]
    names += [name for name in SHOWN_IF_SET if getattr(config, name) != getattr(Group(), name)]
    return " ".join(f"{name}={getattr(config, name)}" for name in names)
