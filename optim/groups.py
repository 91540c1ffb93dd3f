"""From the model's roles to groups of tensors that are trained alike: an exact cover of the parameters, or an error."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from torch import Tensor

from configs.notation import number_of, parse_by_name, raise_if, unmatched_keys
from configs.optim import Graft, Optim, RuleConfig
from optim.constraint import Scope
from optim.norms import build_norm
from optim.rule import Rule, Step, coarsest, load_class

# Where each rule's class is; its module is imported when a role names the rule.
RULES = {
    "muon": "optim.muon:Muon", "adam": "optim.adam:Adam", "normuon": "optim.normuon:NorMuon",
    "steepest": "optim.zoo.steepest:Steepest", "muon2": "optim.zoo.muon2:Muon2", "muown": "optim.zoo.muown:Muown",
    "dion": "optim.zoo.dion:Dion", "dion2": "optim.zoo.dion2:Dion2", "sm3": "optim.zoo.sm3:SM3",
    "prodigy": "optim.zoo.prodigy:Prodigy", "agd": "optim.zoo.agd:AGD", "swan": "optim.zoo.swan:SWAN",
    "shampoo": "optim.zoo.shampoo:Shampoo", "soap": "optim.zoo.soap:SOAP", "soap_muon": "optim.zoo.soap:SOAPMuon",
    "psgd": "optim.zoo.psgd:PSGD", "stiefel": "optim.zoo.stiefel:Stiefel",
}


def build_rule(config: RuleConfig) -> Rule:
    """The rule that a configuration describes, grafted if it says so."""
    rule = load_class(RULES[config.rule])(config)
    if config.graft == Graft():
        return rule
    return load_class("optim.zoo.graft:Grafted")(rule, load_class(RULES[config.graft.rule])(config.graft))


class TensorSpec(NamedTuple):
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
    config: RuleConfig
    rule: Rule
    step: Step
    clip: "object | None"
    """The ball that gradients are projected onto (optim/zoo/clip.py), if any."""
    params: dict[str, Tensor]
    specs: dict[str, TensorSpec]

    @property
    def scope(self) -> Scope:
        """How finely its tensors may be cut: the coarsest of what rule, constraint and clipping need."""
        steps = (self.step_for(spec).scope for spec in self.specs.values())
        sent = "row" if self.config.extra.sparse_rows else "element"
        return coarsest(self.rule.scope, self.clip.scope if self.clip else "element", sent, *steps)

    def step_for(self, spec: TensorSpec) -> Step:
        """The step of its tensors with a spec."""
        return replace(self.step.with_axis(spec.axis), peak_lr=self.step.peak_lr * spec.lr_factor)


def build_groups(params: Mapping[str, Tensor], roles: Mapping[str, str], optim: Optim,
                 axes: Mapping[str, int] | None = None) -> list[ParamGroup]:
    """Groups in the order of Optim's fields; `roles` maps every parameter name to one of them; `axes` names the model
    dimension where it is not the last.

    Raises ValueError listing parameters without a role, roles without a parameter, and unknown roles.
    """
    known = [f.name for f in fields(optim)]
    without = sorted(set(params) ^ set(roles))
    unknown = sorted(f"{name}: {role}" for name, role in roles.items() if role not in known)
    raise_if(bool(without or unknown), f"roles must cover the parameters exactly; not covered: {without}, unknown roles: "
                                     f"{unknown}, known roles: {known}")
    groups = []
    for role in known:
        members = {name: param for name, param in params.items() if roles[name] == role}
        if members:
            groups.append(build_group(role, getattr(optim, role), members, axes or {}))
    return groups


def build_group(role: str, config: RuleConfig, members: dict[str, Tensor], axes: Mapping[str, int]) -> ParamGroup:
    """The group of one role. Raises ValueError for settings that the rule, as it is configured, cannot follow."""
    extra = config.extra
    clip = load_class("optim.zoo.clip:Clip")(build_norm(extra.clip_norm), extra.clip) if extra.clip else None
    group = ParamGroup(role, config, build_rule(config), Step.build(config), clip, members,
                       tensor_specs(role, config, members, axes))
    raise_if(extra.sparse_rows and group.scope == "matrix",
           f"optim.{role}.extra.sparse_rows: rule {config.rule}, as it is configured, updates whole matrices; rule adam or "
           "norm row would do")
    raise_if(bool(extra.blocks) and group.scope != "matrix",
           f"optim.{role}.extra.blocks has no effect on rule {config.rule}, as it is configured: it updates each "
           f"{group.scope} alone")
    return group


def tensor_specs(role: str, config: RuleConfig, members: Mapping[str, Tensor], axes: Mapping[str, int],
                 ) -> dict[str, TensorSpec]:
    """The spec of every tensor of a role. Raises ValueError for names of none, and blocks that do not divide."""
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
