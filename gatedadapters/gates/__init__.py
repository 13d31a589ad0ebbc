"""Hard-concrete gates: the maths, the bank that holds them, and the pressure on them."""

from gatedadapters.config.deprecation import renamed
from gatedadapters.gates.bank import GateBank, GateGroup
from gatedadapters.gates.pressure import Pressure, check_budget

__all__ = ["GateBank", "GateGroup", "Pressure", "check_budget"]

__getattr__ = renamed(__name__, {"Group": "GateGroup"})
