"""Write the prompts of `builtin:structured`, 60 that ask for JSON and 40 for a call of a tool,
each with the JSON schema that its answer is held to:

    python examples/structured_set.py data/prompts/structured.jsonl

All texts were written for this project and are under CC0-1.0. Schemas and tools stand in the
prompt's text, where any target reads them, with a chat template or without one. What a schema
leaves open is short (strings, numbers and arrays have bounds), so that a text ends whatever a model
writes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headstart.common.files import write_atomically

Schema = dict[str, Any]


def text(most: int) -> Schema:
    """A string of so many characters at most."""
    return {"type": "string", "minLength": 1, "maxLength": most}


def whole(least: int, most: int) -> Schema:
    """A whole number."""
    return {"type": "integer", "minimum": least, "maximum": most}


def one_of(*values: str) -> Schema:
    """One of these strings."""
    return {"type": "string", "enum": list(values)}


def some(of: Schema, most: int) -> Schema:
    """A list of one or more."""
    return {"type": "array", "items": of, "minItems": 1, "maxItems": most}


def record(**properties: Schema) -> Schema:
    """An object of just these keys, in this order."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


YES_NO: Schema = {"type": "boolean"}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# What is asked -> the schema of the answer, and six notes that hold it.
NOTES: dict[str, tuple[Schema, list[str]]] = {
    "the person in this note": (
        record(name=text(24), age=whole(0, 120), city=text(20)),
        [
            "Marta Lind, 41, moved to Bergen last spring and repairs violins.",
            "We met Tomas Okoye in Leeds. He is 29 and drives the night bus.",
            "Aiko Tanaka turned 67 in June; her bakery in Porto opens at five.",
            "The new lifeguard is Ben Ferris, 19, from Split.",
            "Dr. Ines Vidal (53) keeps bees on a roof in Lyon.",
            "Old Pavel Novak of Brno is 88 and still skates every morning.",
        ],
    ),
    "the product in this listing": (
        record(
            name=text(24),
            price=whole(0, 9999),
            color=one_of("black", "white", "red", "green", "blue", "yellow"),
            in_stock=YES_NO,
        ),
        [
            "Canvas tent for two, green, 149 euros, ships today.",
            "Sold out: the blue enamel kettle, 35 euros.",
            "Yellow rain boots, sizes 36 to 44, 28 euros, plenty left.",
            "A red bicycle bell that sings, 12 euros, available.",
            "White desk lamp with a heavy foot, 64 euros, back in May.",
            "Black wool blanket, 90 euros, three left in the shop.",
        ],
    ),
    "the weather in this report": (
        record(
            place=text(20),
            temperature=whole(-60, 60),
            sky=one_of("clear", "cloudy", "rain", "snow", "fog"),
        ),
        [
            "Rain all day in Galway at 11 degrees.",
            "Oulu wakes up to snow and minus 14.",
            "Not a cloud over Seville, 36 degrees in the shade.",
            "Thick fog on the coast near Halifax, 6 degrees.",
            "Krakow stays cloudy and mild, 17 degrees.",
            "Minus 3 and clear in Innsbruck, ideal for the slopes.",
        ],
    ),
    "the dish in this recipe": (
        record(
            dish=text(24),
            minutes=whole(1, 600),
            level=one_of("easy", "medium", "hard"),
            ingredients=some(text(14), 3),
        ),
        [
            "Tomato soup: tomatoes, an onion, some basil. Anyone can do it in 25 minutes.",
            "Rye bread takes a practiced hand and 240 minutes; flour, salt and a sour starter.",
            "Pea omelette for beginners, ready in 10 minutes. Eggs, peas, butter.",
            "Plum tart, not too hard: plums, flour, sugar, 70 minutes with the oven.",
            "The three-day stock is for experts. Bones, leeks, patience; 500 minutes of simmering.",
            "Rice pudding needs milk, rice and 45 minutes of gentle stirring. Simple.",
        ],
    ),
    "the problem in this message": (
        record(
            subject=text(32),
            priority=one_of("low", "normal", "high"),
            tags=some(one_of("login", "billing", "display", "network", "printer"), 2),
        ),
        [
            "Nobody in the office can log in since eight. Please hurry!",
            "The invoice for March shows the old address. No rush.",
            "My second screen flickers whenever the printer starts.",
            "The connection drops every few minutes, and customers are waiting.",
            "Small thing: the font on the payment page looks odd.",
            "I forgot my password and the link to reset it does not come.",
        ],
    ),
    "the event in this announcement": (
        record(title=text(28), day=one_of(*DAYS), hour=whole(0, 23)),
        [
            "The chess club plays its open tournament on Saturday from 10 o'clock.",
            "Swap your old books for others: Tuesday evening at 18 in the library.",
            "Wednesday, 7 in the morning: a walk to the herons' nests.",
            "On Friday at 20 the choir sings sea songs in the old mill.",
            "Learn to mend a bicycle tire, Sunday at 14, bring your own bicycle.",
            "Blood donation in the town hall, Monday, doors open at 16.",
        ],
    ),
    "the opinion in this review": (
        record(sentiment=one_of("positive", "mixed", "negative"), stars=whole(1, 5), again=YES_NO),
        [
            "The soup was cold and so was the waiter. Never again.",
            "Lovely rooms, thin walls. We would come back, with ear plugs.",
            "Best bakery of the valley, we buy there every week.",
            "The film begins well and then forgets what it was about.",
            "Broke after two days, and nobody answers the phone.",
            "Five stars: the guide knew every stone by name.",
        ],
    ),
    "the book in this catalog card": (
        record(
            title=text(28),
            author=text(20),
            year=whole(1400, 2100),
            kinds=some(one_of("novel", "poems", "travel", "history", "science"), 2),
        ),
        [
            "Salt Roads, by Ena Marsh, 1987. How merchants crossed the desert.",
            "The Quiet Harbor, a novel by Jon Aas, first printed in 1931.",
            "Poems for Slow Trains. Lucia Bem, 2004.",
            "What Moss Remembers (2016), in which R. Dahl explains bogs.",
            "A Winter in Tbilisi: letters of the traveler Ada Crane, 1899.",
            "K. Osei, Rivers and Kings, 1962, a history of the delta.",
        ],
    ),
    "the train in this notice": (
        record(start=text(16), end=text(16), platform=whole(1, 30), minutes_late=whole(0, 300)),
        [
            "The train from Utrecht to Basel is 15 minutes late, platform 7.",
            "Platform 2: Turin to Nice, on time.",
            "Due to snow the night train Malmo to Berlin runs 90 minutes late from platform 11.",
            "York to Leeds departs from platform 4 instead, 5 minutes late.",
            "Passengers from Lisbon to Faro: platform 9, a delay of 22 minutes.",
            "Ghent to Lille, platform 1, leaves as planned.",
        ],
    ),
    "the animal in this description": (
        record(
            animal=text(18),
            legs=whole(0, 8),
            home=record(land=one_of("water", "forest", "desert", "mountains"), nest=YES_NO),
        ),
        [
            "The dipper, a bird of two legs, dives in streams and builds its nest behind falls.",
            "On four legs the fennec trots through the sand at night. It digs burrows, no nests.",
            "A garden spider hangs between the trees on eight legs.",
            "The eel has no legs at all and crosses an ocean to spawn.",
            "Chamois climb steep rock on four sure legs and sleep in the open.",
            "The dormouse, four-legged and shy, winters in a ball of leaves between roots.",
        ],
    ),
}

# Tools: what they do, and what they take.
TOOLS: dict[str, tuple[str, Schema]] = {
    "get_weather": (
        "Weather of a city.",
        record(city=text(20), unit=one_of("celsius", "fahrenheit")),
    ),
    "set_timer": ("Ring after some minutes.", record(minutes=whole(1, 600), label=text(20))),
    "send_message": ("Send a short message.", record(to=text(16), text=text(40))),
    "convert_money": (
        "Convert an amount of money.",
        record(
            amount=whole(1, 100000),
            source=one_of("EUR", "USD", "GBP", "JPY"),
            target=one_of("EUR", "USD", "GBP", "JPY"),
        ),
    ),
    "add_event": (
        "Put an event into the calendar.",
        record(title=text(24), day=one_of(*DAYS), hour=whole(0, 23)),
    ),
    "search": ("Search the web.", record(query=text(32), limit=whole(1, 10))),
    "switch_light": (
        "Turn a light on or off.",
        record(room=one_of("kitchen", "bedroom", "office", "garden"), on=YES_NO),
    ),
    "translate": (
        "Translate a text.",
        record(text=text(32), language=one_of("French", "German", "Spanish", "Japanese")),
    ),
}
REQUESTS = {
    "get_weather": [
        "Do I need a coat in Oslo today?",
        "How hot is it in Phoenix, in Fahrenheit?",
        "Is it raining in Cardiff?",
        "What is it like outside in Naples right now?",
        "Tell me the temperature in Sapporo in Celsius.",
    ],
    "set_timer": [
        "Remind me in 12 minutes to take the cake out.",
        "The tea needs four minutes.",
        "Wake me in half an hour.",
        "Let me know when 90 minutes of studying are over.",
        "The laundry is done in 55 minutes, ring then.",
    ],
    "send_message": [
        "Tell Nora that I am late.",
        "Ask Sam whether he has the keys.",
        "Wish my sister a happy birthday.",
        "Write to Mr. Bell that the roof is mended.",
        "Let Ivo know that dinner is at eight.",
    ],
    "convert_money": [
        "How much are 250 euros in yen?",
        "I have 80 pounds. What is that in dollars?",
        "Turn 1000 dollars into euros.",
        "What would 15000 yen be in pounds?",
        "Forty dollars in euros, please.",
    ],
    "add_event": [
        "Dentist on Thursday at nine.",
        "Put football with Lea on Sunday at 15.",
        "I meet the landlord on Monday at 17.",
        "Note the concert, Friday at 20.",
        "Team lunch is on Wednesday at noon.",
    ],
    "search": [
        "Find me three articles about tide mills.",
        "Who won the chess Olympiad of 1972?",
        "Look for hiking trails near Bled.",
        "I want five recipes with fennel.",
        "What do herons eat?",
    ],
    "switch_light": [
        "It is too dark in the kitchen.",
        "Turn off the light in the bedroom.",
        "Lights on in the garden, guests are coming.",
        "I am done in the office for today.",
        "Make the garden dark again.",
    ],
    "translate": [
        "How do I say good night in Japanese?",
        "Put 'where is the station' into Spanish.",
        "What is 'thank you very much' in German?",
        "I need 'two coffees, please' in French.",
        "Say 'my bicycle was stolen' in German.",
    ],
}


def rows() -> Iterator[dict[str, Any]]:
    """The prompts of the set."""
    for kind, (schema, notes) in NOTES.items():
        for note in notes:
            asked = f"Describe {kind} as one JSON object of the schema below.\n\nText: {note}\n\n"
            yield row("json", f"{asked}Schema: {json.dumps(schema)}\n\nJSON:", schema)
    names = list(TOOLS)
    for name, requests in REQUESTS.items():
        for number, request in enumerate(requests):
            other = names[(names.index(name) + 1 + number) % len(names)]
            offered = sorted((name, other))
            described = "\n".join(map(json.dumps, map(definition, offered)))
            asked = f"You can call these tools:\n{described}\n\nRequest: {request}\n\n"
            asked += 'Answer with one call as JSON, {"name": ..., "arguments": ...}.\n\nCall:'
            yield row("tool call", asked, {"anyOf": [call(tool) for tool in offered]})


def definition(tool: str) -> Schema:
    """A tool as OpenAI's interface describes it."""
    description, parameters = TOOLS[tool]
    return {"name": tool, "description": description, "parameters": parameters}


def call(tool: str) -> Schema:
    """The schema of its calls."""
    return record(name={"const": tool}, arguments=TOOLS[tool][1])


def row(category: str, prompt: str, schema: Schema) -> dict[str, Any]:
    """A line of the file, without its id."""
    return {
        "category": category,
        "prompt": prompt,
        "json_schema": schema,
        "source": "written here (examples/structured_set.py)",
        "licence": "CC0-1.0",
    }


def main() -> None:
    """Write the file that the command names."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/structured_set.py FILE")
    lines = (
        json.dumps({"id": f"structured-{number:03}"} | row) + "\n"
        for number, row in enumerate(rows())
    )
    write_atomically(Path(sys.argv[1]), "".join(lines))


if __name__ == "__main__":
    main()
