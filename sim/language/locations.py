"""Places as numbers: percent of the picture's width from the left and of its height from the top, to the nearest five.

Coarse, since training shifts the picture by a few pixels; and the densest thing that a text can say of a picture, which is
what an image tower learns from first.
"""

from sim.language.account import Account, Item
from sim.scene_state import Sight

GRID = 5  # percent


def locate(account: Account) -> Item | None:
    """Where one thing is. The answer is not the only right one: five percent more or less is as good."""
    if not account.things:
        return None
    a = account.chance.choice(account.things)
    slots = {"a": account.names[a], **_place(a.base)}
    return Item("locate", "locate.ask", "locate.tell", "x {x}, y {y}".format(**slots), slots, a.name, is_exact=False)


def locations(account: Account) -> str | None:
    """Where everything is, from left to right."""
    if len(account.things) < 2:
        return None
    said = [account.say("locate.each", {"a": account.names[a], **_place(a.base)}, sentence=False) for a in account.things]
    return account.say("locate.tell_all", {"list": "; ".join(said)})


def _place(sight: Sight) -> dict[str, str]:
    x, y = (GRID * round(100 * share / GRID) for share in sight.centre)
    return {"x": str(x), "y": str(y)}
