"""Parameter groups: for each role its parameters, config and rule. Every parameter is in exactly one group."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from torch import Tensor

from configs.notation import number_of, parse_by_name, raise_if, unmatched_keys
from configs.optim import Graft, Optim, RuleConfig
from optim.constraint import Scope
from optim.norms import build_norm
from optim.rule import Rule, Step, coarsest, load_class

RULES_OF_THE_RECORD = ("muon", "adam", "normuon")  # these are files of optim/ itself, all others of optim/zoo/


def rule_class(config: type[RuleConfig]) -> type[Rule]:
    """Return the class that a config's rule runs: for rule "lion" with config class Lion, Lion in optim/zoo/lion.py.

    Its module is imported here, so that a run loads only the rules that it uses.
    """
    folder = "optim" if config.rule in RULES_OF_THE_RECORD else "optim.zoo"
    return load_class(f"{folder}.{config.rule}:{config.__name__}")


def build_rule(config: RuleConfig) -> Rule:
    """Return the rule that a config describes, grafted onto a second rule's step length if config.graft names one."""
    rule = rule_class(type(config))(config)
    if config.graft == Graft():
        return rule
    return load_class("optim.zoo.graft:Grafted")(rule, rule_class(type(config.graft))(config.graft))


class TensorSpec(NamedTuple):
    """Settings of one tensor that differ within its group; tensors with different specs go into different banks."""

    axis: int = -1
    """Model dimension of the tensor, -1 or -2: constraints on vectors act along it."""
    blocks: int = 1
    """Blocks of rows that the tensor is cut into, each a matrix for the rule."""
    lr_factor: float = 1.0
    """Multiplies the group's learning rate."""


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Parameters of one role, with their config and the rule built from it."""

    role: str
    """Field of Optim that configures the group: matrix, embed, head, ..."""
    config: RuleConfig
    """Hyperparameters."""
    rule: Rule
    """Map from gradients to directions."""
    step: Step
    """Update of the weights along a direction."""
    clip: "object | None"
    """Gradient clipping (optim.zoo.clip.Clip); None: no clipping."""
    params: dict[str, Tensor]
    """Parameters by name."""
    specs: dict[str, TensorSpec]
    """Spec of each parameter, by name."""

    @property
    def scope(self) -> Scope:
        """Finest piece of a tensor that can be updated alone, by rule, step, clipping and communication."""
        step_scopes = (self.step_for(spec).scope for spec in self.specs.values())
        sent_scope = "row" if self.config.extra.sparse_rows else "element"
        return coarsest(self.rule.scope, self.clip.scope if self.clip else "element", sent_scope, *step_scopes)

    def step_for(self, spec: TensorSpec) -> Step:
        """Return the step of tensors with this spec; its peak lr has the tensor's factor too, as lr will have."""
        return replace(self.step.with_axis(spec.axis), peak_lr=self.step.peak_lr * spec.lr_factor)


def build_groups(params: Mapping[str, Tensor], roles: Mapping[str, str], optim: Optim,
                 axes: Mapping[str, int] | None = None) -> list[ParamGroup]:
    """Return one group for each role that has parameters, in the order of Optim's fields.

    `roles` maps every parameter name to a field of `optim`; `axes` gives the model dimension of tensors where it is not -1.
    Raises ValueError that lists parameters without a role, roles without a parameter, and unknown roles.
    """
    known = [f.name for f in fields(optim)]
    uncovered = sorted(set(params) ^ set(roles))
    unknown = sorted(f"{name}: {role}" for name, role in roles.items() if role not in known)
    raise_if(bool(uncovered or unknown), f"roles must cover the parameters exactly; not covered: {uncovered}, unknown "
                                         f"roles: {unknown}, known roles: {known}")
    groups = []
    for role in known:
        members = {name: param for name, param in params.items() if roles[name] == role}
        if members:
            groups.append(build_group(role, getattr(optim, role), members, axes or {}))
    return groups


def build_group(role: str, config: RuleConfig, members: dict[str, Tensor], axes: Mapping[str, int]) -> ParamGroup:
    """Return the group of one role. Raises ValueError for settings that the configured rule cannot follow."""
    extra = config.extra
    clip = load_class("optim.zoo.clip:Clip")(build_norm(extra.clip_norm), extra.clip) if extra.clip else None
    group = ParamGroup(role, config, build_rule(config), Step.build(config), clip, members,
                       tensor_specs(role, config, members, axes))
    raise_if(extra.sparse_rows and group.scope == "matrix",
             f"optim.{role}.extra.sparse_rows: rule {config.rule} with these settings updates whole matrices, not rows; use "
             "rule adam, or rule steepest with norm row")
    raise_if(bool(extra.blocks) and group.scope != "matrix",
             f"optim.{role}.extra.blocks has no effect on rule {config.rule} with these settings, which updates each "
             f"{group.scope} alone; leave it out")
    return group


def tensor_specs(role: str, config: RuleConfig, members: Mapping[str, Tensor], axes: Mapping[str, int],
                 ) -> dict[str, TensorSpec]:
    """Return the spec of every tensor of a role, by name.

    Raises ValueError for a name in lr_factors or blocks that fits no tensor, and for blocks that do not divide the rows.
    """
    factors, blocks = parse_by_name(config.extra.lr_factors), parse_by_name(config.extra.blocks)
    for field, numbers in (("lr_factors", factors), ("blocks", blocks)):
        unmatched = unmatched_keys(numbers, members)
        raise_if(bool(unmatched), f"optim.{role}.extra.{field}: no tensor of the role has {unmatched[:1]} in its name; they "
                                  f"are {', '.join(members)}")
    specs = {name: TensorSpec(axes.get(name, -1), int(number_of(name, blocks, 1)), number_of(name, factors, 1.0))
             for name in members}
    for name, spec in specs.items():
        rows = members[name].size(0) if members[name].ndim else 1
        raise_if(rows % spec.blocks != 0,
                 f"optim.{role}.extra.blocks: {spec.blocks} does not divide the {rows} rows of {name}")
    return specs
