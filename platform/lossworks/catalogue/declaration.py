"""What an entry of the catalogue declares: its paper, its formula and its hyperparameters.

From a declaration come the constructor's checks, the fields of a spec, the search space, the tables and the
tests that every entry passes. Nothing here imports torch, so that specs are checked and tables are printed
at once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from lossworks.errors import UserError, nearest

OWN = "lossworks"  # the package whose entries need no entry point


@dataclass(frozen=True)
class Paper:
    """Where an entry comes from.

    Attributes:
        title: Of the paper.
        authors: First author and others, as in a citation.
        year: Of publication.
        where: Section or equation that the entry follows, or the venue.
    """

    title: str
    authors: str
    year: int
    where: str = ""

    def __str__(self) -> str:
        return f"{self.authors}, {self.title}, {self.year}" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True)
class Hyperparameter:
    """One number, switch or choice of an entry.

    Attributes:
        name: As in the constructor; empty until the class that holds it is made.
        type: Of its values.
        default: Value unless the user says.
        meaning: One line: symbol, unit, and what its limits turn the entry into.
        ge: Least value, included.
        gt: Least value, excluded.
        le: Largest value, included.
        lt: Largest value, excluded.
        search: Range in which a search looks, or the choices it tries; None if it is not searched.
        log: Whether it is searched on a logarithmic scale.
        choices: Allowed values of a ``choice``.
        optional: Whether None is allowed.
    """

    type: Literal["number", "integer", "switch", "choice", "numbers", "text"]
    default: Any
    meaning: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    search: tuple[Any, ...] | None = None
    log: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    name: str = ""

    def check(self, value: Any, owner: str) -> Any:
        """Return ``value`` in its type.

        Raises:
            UserError: It is of another type or out of range; the message names ``owner`` and the range.
        """
        if value is None and self.optional:
            return None
        if self.type == "numbers":
            if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
                raise self._refusal(value, owner)
            return tuple(self._checked_number(item, owner) for item in value)
        if self.type == "switch":
            if not isinstance(value, bool):
                raise self._refusal(value, owner)
            return value
        if self.type == "text":
            if not isinstance(value, str) or not value:
                raise self._refusal(value, owner)
            return value
        if self.type == "choice":
            if value not in self.choices:
                raise self._refusal(value, owner)
            return value
        return self._checked_number(value, owner)

    def _checked_number(self, value: Any, owner: str) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        whole = self.type != "integer" or (number and value == int(value))
        inside = number and (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )
        if not (number and whole and inside):
            raise self._refusal(value, owner)
        return int(value) if self.type == "integer" else float(value)

    def _refusal(self, value: Any, owner: str) -> UserError:
        return UserError(f"{owner}: {self.name}={value!r} must be {self.allowed}")

    @property
    def allowed(self) -> str:
        """What values are allowed, in words."""
        if self.type == "choice":
            return f"one of {', '.join(self.choices)}"
        what = {
            "number": "a number",
            "integer": "an integer",
            "switch": "true or false",
            "numbers": "a list of numbers",
            "text": "a text",
        }[self.type]
        text = within(what, ge=self.ge, gt=self.gt, le=self.le, lt=self.lt)
        return f"{text}, or null" if self.optional else text


def within(
    what: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> str:
    """Return in words what a value may be: ``a number at least 0 and below 1``."""
    words = (("at least", ge), ("above", gt), ("at most", le), ("below", lt))
    bounds = [f"{word} {bound:g}" for word, bound in words if bound is not None]
    return f"{what} {' and '.join(bounds)}" if bounds else what


def number(default: float | None, meaning: str, **limits: Any) -> Any:
    """Declare a number; ``limits`` are the further fields of :class:`Hyperparameter`."""
    return Hyperparameter("number", default, meaning, **limits)


def integer(default: int | None, meaning: str, **limits: Any) -> Any:
    """Declare an integer."""
    return Hyperparameter("integer", default, meaning, **limits)


def switch(default: bool, meaning: str, *, search: bool = False) -> Any:
    """Declare something that is on or off."""
    return Hyperparameter("switch", default, meaning, search=(False, True) if search else None)


def choice(default: str, meaning: str, choices: tuple[str, ...], *, search: bool = False) -> Any:
    """Declare one of some words."""
    return Hyperparameter("choice", default, meaning, choices=choices, search=choices if search else None)


def text(default: str | None, meaning: str) -> Any:
    """Declare a text, such as the path of a file; None is allowed if it is the default."""
    return Hyperparameter("text", default, meaning, optional=default is None)


def numbers(default: tuple[float, ...] | None, meaning: str, **limits: Any) -> Any:
    """Declare a list of numbers, each within the limits."""
    return Hyperparameter("numbers", default, meaning, **limits)


@dataclass(frozen=True)
class Case:
    """A value of the hyperparameters at which an entry equals another one.

    ``entry(hyperparameters) = scale · other(other_hyperparameters) + constant + log_classes · log K``.
    """

    hyperparameters: dict[str, Any]
    equals: str
    other_hyperparameters: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    constant: float = 0.0
    log_classes: float = 0.0


@dataclass(frozen=True)
class Declaration:
    """All that is known of an entry without importing its code.

    Attributes:
        slug: Its name, in kebab case.
        section: The part of the catalogue that it belongs to: ``losses``, ``methods`` (training procedures),
            ``analyses`` (figures of something trained), or one of another room.
        kind: What it works on, of losses: ``row`` (row statistics of logits, with or without the logits),
            ``sequence`` (the same, reduced per sequence before a nonlinearity), ``logits`` (dense logits (N,
            K)), ``margin`` (one logit a row, two classes), ``value`` (outputs of a head against a scalar
            target), ``multi-label`` (sets of classes), ``attention`` (entropies of a language model's
            attention), ``bag`` (mean responses of groups of rows), ``map`` (logits of an image's pixels
            against its mask), ``distillation`` (what a teacher says of the same rows), ``cross-tokenizer``
            (what a teacher of other tokens says of the same text), ``preference`` (a chosen and a rejected
            answer), ``unlearning`` (what is to be forgotten and what is to stay), or what a package brings.
        title: One line.
        formula: The formula as text.
        paper: Its source.
        hyperparameters: In the order of the class.
        without_logits: Whether it can be the loss of a linear head that never builds the logits.
        products: Matrix products E·Cᵀ of loss and gradients then; 3 is plain cross-entropy, 0 none.
        cases: Where it equals other entries.
        invariances: Changes of a row's logits that leave it as it is: ``shift``, ``scale``.
        requires: Inputs besides prediction and target, by their names in
            :class:`lossworks.losses.Context`.
        roles: Companions of the model that it reads, such as ``teacher``; a spec names them in ``roles``.
        flags: ``random``: draws random numbers; ``unmonitored``: its value says nothing about progress;
            ``whole-batch``: splitting a batch changes it; ``own-outputs``: predictions must not have seen
            the targets; ``other-tokens``: the teacher may read with another tokenizer; ``plain-torch``: it
            has no Triton kernel; ``beside``: it says nothing of the targets, and needs a loss of those beside
            it.
        module: Where the code is, as ``package.module:Class``.
        example: A command line that runs it; empty if no command does.
        package: The installed distribution that it comes from.
    """

    slug: str
    section: str
    kind: str
    title: str
    formula: str
    paper: Paper
    hyperparameters: tuple[Hyperparameter, ...]
    module: str
    without_logits: bool = False
    products: float = 0.0
    cases: tuple[Case, ...] = ()
    invariances: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    example: str = ""
    package: str = OWN

    def check(self, values: Mapping[str, Any], beside: Iterable[str] = ()) -> dict[str, Any]:
        """Return all hyperparameters: ``values``, and defaults for the others.

        Args:
            values: By name.
            beside: What stands beside hyperparameters where they were given, which a mistyped name may mean.

        Raises:
            UserError: A name is unknown or a value out of range.
        """
        known = {parameter.name: parameter for parameter in self.hyperparameters}
        for name in values:
            if name not in known:
                guess = nearest(name, [*known, *beside])
                hint = f"did you mean {guess}?" if guess else f"known: {', '.join(known) or 'none'}"
                raise UserError(f"{self.slug}: no hyperparameter {name}; {hint}")
        return {
            name: parameter.check(values.get(name, parameter.default), self.slug)
            for name, parameter in known.items()
        }

    def search_space(self) -> dict[str, dict[str, Any]]:
        """Return what a search varies, by hyperparameter, in plain words that any searcher can be given.

        ``{"type": "number" | "integer", "low": …, "high": …, "log": …}`` or
        ``{"type": "choice", "values": […]}``, each with its ``"default"``.
        """
        return {p.name: _searched(p) for p in self.hyperparameters if p.search is not None}

    @property
    def of_next_tokens(self) -> bool:
        """Whether it can train a language model on its targets, without logits and without further inputs."""
        of_classes = self.kind in ("row", "sequence") and self.without_logits
        return of_classes and not self.requires and "own-outputs" not in self.flags

    @property
    def neutral(self) -> dict[str, Any] | None:
        """The hyperparameters at which it equals plain cross-entropy up to a constant, or None."""
        plain = (c for c in self.cases if c.equals == "cross-entropy" and not c.other_hyperparameters)
        return next((case.hyperparameters for case in plain), None)

    def alias(self, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
        """Return which entry it equals up to a constant at some hyperparameters, with that one's, or None.

        Args:
            values: All hyperparameters, as :meth:`check` returns them.
        """
        for case in self.cases:
            if case.scale == 1 and all(values[name] == value for name, value in case.hyperparameters.items()):
                return case.equals, dict(case.other_hyperparameters)
        return None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, without what has its default."""
        values = asdict(self)
        values["hyperparameters"] = [_without_defaults(p) for p in self.hyperparameters]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the declaration that ``to_json`` wrote."""
        given = _with_tuples(values)
        given["paper"] = Paper(**values["paper"])
        given["cases"] = tuple(Case(**case) for case in values["cases"])
        given["hyperparameters"] = tuple(
            Hyperparameter(**_with_tuples(parameter)) for parameter in values["hyperparameters"]
        )
        return cls(**given)


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _searched(parameter: Hyperparameter) -> dict[str, Any]:
    search = parameter.search or ()
    if parameter.type in ("number", "integer"):
        low, high = search
        space = {"type": parameter.type, "low": low, "high": high, "log": parameter.log}
    else:
        space = {"type": "choice", "values": list(search)}
    return {**space, "default": parameter.default}


def _without_defaults(parameter: Hyperparameter) -> dict[str, Any]:
    plain = asdict(Hyperparameter("number", None, ""))
    kept = {"type", "default", "meaning", "name"}
    return {name: value for name, value in asdict(parameter).items() if name in kept or value != plain[name]}
