"""The recipes of the object bank and how often each is drawn."""

from __future__ import annotations

from collections.abc import Callable

from . import shapes_tools as tools
from . import shapes_toys as toys
from . import shapes_vessels as vessels
from .shapes_outlines import Rng, Thing

RECIPES: dict[str, tuple[float, Callable[[Rng], Thing]]] = {
    f.__name__: (weight, f)
    for weight, f in [
        (4, vessels.carton),
        (1.5, vessels.small_box),
        (2, vessels.big_box),
        (2, vessels.gable),
        (2.5, vessels.rounded_box),
        (3.5, vessels.can),
        (1.5, vessels.rod),
        (1.2, vessels.disc),
        (4, vessels.bottle),
        (2, vessels.jar),
        (2, vessels.cup),
        (3.5, vessels.mug),
        (1.5, vessels.bowl),
        (1, vessels.glass),
        (1.5, vessels.vase),
        (1, vessels.ring),
        (3.5, tools.phone),
        (1, tools.tablet),
        (1.5, tools.remote),
        (1.2, tools.card),
        (1.5, tools.book),
        (2, tools.pen),
        (1, tools.spoon),
        (1, tools.knife),
        (0.8, tools.fork),
        (1, tools.wrench),
        (0.8, tools.key),
        (1.5, tools.plate_shape),
        (1.5, tools.prism),
        (1.5, tools.screwdriver),
        (1, tools.hammer),
        (1.5, tools.brush),
        (1, tools.toothbrush),
        (1, tools.pan),
        (1, tools.kettle),
        (1.5, tools.basket),
        (1.5, tools.spray),
        (1.5, tools.drill),
        (1, tools.gamepad),
        (1, tools.mouse),
        (1.5, toys.ball),
        (2, toys.fruit),
        (1.2, toys.banana),
        (2, toys.egg_toy),
        (2.5, toys.stone),
        (2, toys.figure),
        (1, toys.toy_car),
        (1.5, toys.bricks),
        (1.2, toys.sponge),
        (0.8, toys.pillow),
        (1, toys.pouch),
        (2.5, toys.hinged_box),
        (1, toys.clamshell),
        (1.2, toys.scissors),
        (0.8, toys.pliers),
        (1, toys.flip_phone),
    ]
}
"""Name -> (share among drawn objects, recipe)."""
