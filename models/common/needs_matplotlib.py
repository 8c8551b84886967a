"""Imported before all else by programs that draw: without matplotlib they end here, in words."""

from models.common.programs import require_extra

require_extra(("matplotlib",))
