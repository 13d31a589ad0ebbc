"""The discrete result of a search: what it is, the rule that makes one from gates, the folder it is saved in."""

from gatedadapters.structure.structure import KeptPath, Offer, SiteRecord, Structure, column

__all__ = ["KeptPath", "Offer", "SiteRecord", "Structure", "column"]
