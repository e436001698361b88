"""Flow mathematics in float64: interpolants, diffusion, integrators and time grids become one `Schedule`."""

from flowfast.flow.diffusion import DIFFUSIONS, Diffusion, parse_diffusion
from flowfast.flow.grid import GRIDS, grid_times
from flowfast.flow.integrator import COMBINATIONS, Integrator, parse_integrator
from flowfast.flow.interpolant import INTERPOLANTS, Interpolant, Point, parse_interpolant
from flowfast.flow.schedule import (
    COLUMNS,
    Schedule,
    ScheduleSpec,
    SearchOverPaths,
    build_schedule,
    search_over_paths_schedule,
)

__all__ = [
    "COLUMNS",
    "COMBINATIONS",
    "DIFFUSIONS",
    "GRIDS",
    "INTERPOLANTS",
    "Diffusion",
    "Integrator",
    "Interpolant",
    "Point",
    "Schedule",
    "ScheduleSpec",
    "SearchOverPaths",
    "build_schedule",
    "grid_times",
    "parse_diffusion",
    "parse_integrator",
    "parse_interpolant",
    "search_over_paths_schedule",
]
