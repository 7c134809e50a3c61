"""Declarations in words, for tables and pages."""

import json

from lossworks.catalogue.declaration import OWN, Case, Declaration, Hyperparameter


def without_logits(entry: Declaration) -> str:
    """Return whether an entry runs without logits, and at what cost, in a few words."""
    if not entry.without_logits:
        return "–"
    return f"yes, {entry.products:g} products" if entry.products else "yes, no product"


def search_text(parameter: Hyperparameter) -> str:
    """Return where a hyperparameter is searched, in a few words."""
    if parameter.search is None:
        return "–"
    if parameter.type in ("number", "integer"):
        low, high = parameter.search
        return f"{low:g} to {high:g}" + (", log" if parameter.log else "")
    return ", ".join(str(value).lower() for value in parameter.search)


def value_text(value: object) -> str:
    """Return a default as it would be written in a spec."""
    return json.dumps(value) if not isinstance(value, str) else value


def case_text(case: Case) -> str:
    """Return what an entry equals where, in a few words."""
    own = ", ".join(f"{name}={value_text(value)}" for name, value in case.hyperparameters.items())
    other = ", ".join(f"{name}={value_text(value)}" for name, value in case.other_hyperparameters.items())
    factor = f"{case.scale:g} times " if case.scale != 1 else ""
    constant = f" plus {case.constant:g}" if case.constant else ""
    logs = f" plus {case.log_classes:g}·log K" if case.log_classes else ""
    return f"{factor}`{case.equals}`{f' ({other})' if other else ''}{constant}{logs} at {own}"


def facts(entry: Declaration) -> list[str]:
    """Return what an entry declares besides formula and hyperparameters, a sentence each."""
    found = [f"{entry.paper}."]
    if entry.without_logits:
        found.append(f"Without logits: {without_logits(entry)}.")
    found += [f"Equals {case_text(case)}." for case in entry.cases]
    if entry.invariances:
        found.append(f"Unchanged by a {' and a '.join(entry.invariances)} of the logits.")
    named = {"Needs the inputs": entry.requires, "Needs the roles": entry.roles, "Flags": entry.flags}
    for what, names in named.items():
        if names:
            found.append(f"{what}: {', '.join(names)}.")
    return found if entry.package == OWN else [*found, f"From the package {entry.package}."]


def run_text(entry: Declaration) -> str:
    """Return which command runs an entry, or how Python does."""
    if entry.example:
        return f"Run it: {entry.example}"
    module, _, name = entry.module.partition(":")
    return f"No command runs it; from Python: from {module} import {name}"
