"""The other optimizers of the literature, one file each, imported when a role names it; and what few runs add to a step."""
