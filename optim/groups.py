"""From the model's roles to groups of tensors that are trained alike: an exact cover, or an error that lists the strays."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from configs.groups import EVERY_RULE_READS, Group, Optim, acting_fields
from configs.refuse import refuse
from optim.clip import Clip
from optim.norms import Scope
from optim.rules import Rule, build_rule
from optim.step import Step, coarsest

SHOWN_IF_SET = ("constraint", "radial_brake", "row_floor", "update_every", "sparse_rows")


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Tensors of one role, their configuration and the rule built from it."""

    role: str
    config: Group
    rule: Rule
    step: Step
    params: dict[str, Tensor]
    axes: dict[str, int]
    """The dimension of each tensor that is the model's, -1 or -2: what constraints on vectors act along."""

    @property
    def clip(self) -> Clip | None:
        """The ball that its gradients are projected onto, if any."""
        return Clip.build(self.config)

    @property
    def scope(self) -> Scope:
        """How finely its tensors may be cut: the coarsest of what rule, constraint and clipping need."""
        steps = (self.step.along(axis).scope for axis in self.axes.values())
        sent = "row" if self.config.sparse_rows else "element"
        return coarsest(self.rule.scope, self.clip.scope if self.clip else "element", sent, *steps)

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
                                     {name: (axes or {}).get(name, -1) for name in members}))
            refuse(config.sparse_rows and groups[-1].scope == "matrix",
                   f"optim.{role}.sparse_rows: rule {config.rule}, as it is configured, updates whole matrices; rule adam "
                   "or norm row would do")
    return groups


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
