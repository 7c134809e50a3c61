"""What every entry of the catalogue is: a class that declares its paper, formula and hyperparameters."""

from dataclasses import replace
from typing import Any, ClassVar

from lossworks.catalogue.declaration import Case, Declaration, Hyperparameter, Paper


class Entry:
    """A class of the catalogue: what it declares, and its checked hyperparameters.

    A subclass declares hyperparameters as class attributes (``temperature: float = number(1.0, …)``); on an
    instance they are plain values. The attributes below are those of
    :class:`lossworks.catalogue.declaration.Declaration`; ``title`` is the first line of the docstring, and
    ``{slug}`` in ``example`` stands for the slug.
    """

    slug: ClassVar[str] = ""
    section: ClassVar[str]
    kind: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[Paper]
    hyperparameters: ClassVar[tuple[Hyperparameter, ...]] = ()
    without_logits: ClassVar[bool] = False
    products: ClassVar[float] = 0.0
    cases: ClassVar[tuple[Case, ...]] = ()
    invariances: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()
    roles: ClassVar[tuple[str, ...]] = ()
    flags: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = ""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = {k: replace(v, name=k) for k, v in vars(cls).items() if isinstance(v, Hyperparameter)}
        # What is declared anew keeps its place.
        cls.hyperparameters = tuple(({p.name: p for p in cls.hyperparameters} | own).values())

    @classmethod
    def declaration(cls) -> Declaration:
        """Return all that is declared here."""
        return Declaration(
            slug=cls.slug,
            section=cls.section,
            kind=cls.kind,
            title=(cls.__doc__ or "").strip().partition("\n")[0].rstrip("."),
            formula=cls.formula,
            paper=cls.paper,
            hyperparameters=cls.hyperparameters,
            module=f"{cls.__module__}:{cls.__qualname__}",
            without_logits=cls.without_logits,
            products=cls.products,
            cases=cls.cases,
            invariances=cls.invariances,
            requires=cls.requires,
            roles=cls.roles,
            flags=cls.flags,
            example=cls.example.replace("{slug}", cls.slug),
        )

    def set_hyperparameters(self, values: dict[str, Any]) -> None:
        """Check hyperparameters and make them attributes.

        Raises:
            UserError: A name is unknown or a value out of range.
        """
        for name, value in self.declaration().check(values).items():
            object.__setattr__(self, name, value)

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters as they are."""
        return {p.name: getattr(self, p.name) for p in self.hyperparameters}

    def extra_repr(self) -> str:
        """Return the hyperparameters as they would be given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings().items())


class Settings(Entry):
    """An entry that is no module: its checked hyperparameters are attributes.

    Args:
        values: The hyperparameters that the class declares.

    Raises:
        UserError: A name is unknown or a value out of range.
    """

    def __init__(self, **values: Any) -> None:
        self.set_hyperparameters(values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
