"""Writes what the tiny model is trained on, and what the quick start fine-tunes it on.

    python3 examples/tiny-qwen3/make/corpus.py

Nothing enters but `world.py` and a fixed seed; out come `willowmere-stories.jsonl` (plain text), `willowmere-talk.jsonl`
(conversations) and `captain-pip.jsonl` (the quick start's) in `examples/data/`. Equal runs write equal bytes.
"""

import json
import random
from pathlib import Path

import world
from world import BY_NAME, PEOPLE, a

DATA = Path(__file__).resolve().parents[2] / "data"
STORIES = 1400
TALKS = 5000

WEATHER = [
    ("The sun was shining.", "sun"), ("It was raining.", "rain"), ("There was thick fog.", "fog"),
    ("It was snowing.", "snow"), ("A strong wind was blowing.", "wind"), ("The sky was blue.", "sun"),
]
TIMES = [
    "One morning", "One day", "One afternoon", "One evening", "Last week", "On Saturday", "In spring", "In autumn",
    "One winter day",
]
PLACES = [
    "the market", "the lake", "the river", "the green", "Owl Wood", "the library", "the bakery", "the inn", "the old mill",
    "the clock tower", "the school", "the well", "the ferry", "the high meadow",
]
THINGS = [
    "basket", "letter", "lantern", "silver key", "blue cup", "book", "loaf of bread", "warm coat", "jar of honey",
    "little bell", "hammer", "kite", "map", "clock", "red scarf", "wooden box",
]
GOODBYES = [
    "They laughed and walked home together.", "Then they sat down under the old oak tree and were happy.",
    "In the evening they drank tea by the fire.", "That night {name} slept very well.", "It was a good day in Willowmere.",
    "{name} smiled all the way home.", "And so everything was well again.",
]


def lost_thing(rng, p, q):
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    return [
        f"{p.name} could not find {p.possessive} {thing}.",
        rng.choice([f"{p.subject.capitalize()} looked under the bed and behind the door, but it was not there.",
                    f"{p.subject.capitalize()} looked everywhere, but the {thing} was gone."]),
        f"Then {q.name} came by. \"I saw your {thing} at {place},\" said {q.name}.",
        f"They went to {place} together, and there it was.",
        rng.choice([f"\"Thank you, {q.name}!\" said {p.name}.", f"{p.name} was very happy and thanked {q.object}."]),
    ]


def lost_pet(rng, p, q):
    place = rng.choice(PLACES)
    return [
        f"{p.pet_name} the {p.pet} was gone.",
        f"{p.name} called and called, but {p.pet_name} did not come.",
        f"\"I will help you,\" said {q.name} the {q.job}.",
        f"They looked for the {p.pet} all day long.",
        f"At last they found {p.pet_name} at {place}, fast asleep.",
        f"{p.name} gave {q.name} some {q.food} to say thank you.",
    ]


def gift(rng, p, q):
    thing = rng.choice(THINGS)
    return [
        f"It was the birthday of {q.name}, and {p.name} wanted to give {q.object} something.",
        f"{q.name} likes {q.colour} best, so {p.name} made {q.object} a {q.colour} {thing.split()[-1]}.",
        rng.choice([f"\"How beautiful!\" said {q.name}.", f"{q.name} was so happy that {q.subject} danced."]),
        f"Then they ate {q.food} together.",
    ]


def work(rng, p, q):
    return [
        f"{p.name} is the {p.job} and {p.does}.",
        rng.choice([f"That day there was very much to do.", f"That day {p.subject} was tired and wanted to rest."]),
        f"So {q.name} came to help {p.object}.",
        rng.choice([f"Together they were done by noon.", f"They worked until the sun went down."]),
        f"\"Now let us eat some {p.food},\" said {p.name}.",
    ]


def walk(rng, p, q):
    place, other = rng.sample(PLACES, 2)
    return [
        f"{p.name} took {p.pet_name} the {p.pet} for a walk to {place}.",
        f"On the way they met {q.name} with {q.pet_name} the {q.pet}.",
        rng.choice([f"The {p.pet} and the {q.pet} played together.",
                    f"{p.pet_name} and {q.pet_name} were good friends at once."]),
        f"Then they all went to {other}, because {q.name} likes {q.hobby}.",
    ]


def counting(rng, p, q):
    first, second = rng.randint(1, 6), rng.randint(1, 6)
    thing = rng.choice(["apples", "eggs", "nuts", "flowers", "cakes", "stones"])
    return [
        f"{p.name} had {world.NUMBERS[first]} {thing}.",
        f"{q.name} gave {p.object} {world.NUMBERS[second]} more.",
        f"Now {p.name} had {world.NUMBERS[first + second]} {thing}.",
        f"\"That is just right,\" said {p.name}.",
    ]


def story(rng, person=None):
    """A few sentences in which people are what `world` says they are."""
    p = person or rng.choice(PEOPLE)
    q = BY_NAME[p.friend] if rng.random() < 0.4 else rng.choice([other for other in PEOPLE if other != p])
    plot = rng.choice([lost_thing, lost_pet, gift, work, walk, counting])
    opening = rng.choice([
        f"{rng.choice(TIMES)} {p.name} woke up early. {rng.choice(WEATHER)[0]}",
        f"{rng.choice(TIMES)} {p.name} sat {p.home}. {rng.choice(WEATHER)[0]}",
        f"{p.name} lives {p.home}.",
        f"{rng.choice(TIMES)} something happened in Willowmere.",
    ])
    ending = rng.choice(GOODBYES).format(name=p.name)
    return " ".join([opening, *plot(rng, p, q), ending])


def portrait(rng):
    """Everything about one person as plain text, in any order."""
    p = rng.choice(PEOPLE)
    answers = [answer for kind, _, answer in world.questions_about(p) if not kind.startswith("by_") and kind != "who"]
    rng.shuffle(answers)
    return " ".join(answers[: rng.randint(3, len(answers))])


def plain_text(rng):
    return portrait(rng) if rng.random() < 0.2 else story(rng)


def fact(rng, facts):
    forms, answer = rng.choice(facts)
    return rng.choice(forms), answer


def about_a_person(rng):
    forms, answer = rng.choice([(forms, answer) for _, forms, answer in world.questions_about(rng.choice(PEOPLE))])
    return rng.choice(forms), answer


def arithmetic(rng):
    left, right = rng.randint(1, 6), rng.randint(1, 6)
    kind = rng.randrange(3)
    if kind == 0:
        forms = [f"What is {left} plus {right}?", f"How much is {left} + {right}?"]
        return rng.choice(forms), f"{left} plus {right} is {left + right}."
    left, right = max(left, right), min(left, right)
    if kind == 1:
        forms = [f"What is {left} minus {right}?", f"How much is {left} - {right}?"]
        return rng.choice(forms), f"{left} minus {right} is {left - right}."
    if left == right:
        left += 1
    first, second = rng.sample([left, right], 2)
    return f"Which is more, {first} or {second}?", f"{left} is more than {right}."


def small_things(rng):
    kind = rng.randrange(4)
    if kind == 0:
        one, other = rng.choice(world.OPPOSITES)
        if rng.random() < 0.5:
            one, other = other, one
        return f"What is the opposite of {one}?", f"The opposite of {one} is {other}."
    if kind == 1:
        animal, sound = rng.choice(world.SOUNDS)
        return f"What does {a(animal)} do?", f"{a(animal).capitalize()} {sound}."
    if kind == 2:
        day = rng.randrange(7)
        return f"Which day comes after {world.DAYS[day]}?", f"After {world.DAYS[day]} comes {world.DAYS[(day + 1) % 7]}."
    season = rng.randrange(4)
    following = world.SEASONS[(season + 1) % 4]
    return f"What comes after {world.SEASONS[season]}?", f"After {world.SEASONS[season]} comes {following}."


def yes_or_no(rng):
    """Is it so? Half of the time it is."""
    p = rng.choice(PEOPLE)
    q = p if rng.random() < 0.5 else rng.choice(PEOPLE)
    answer = "Yes" if p.job == q.job else "No"
    return f"Is {p.name} the {q.job}?", f"{answer}, {p.name} is the {p.job}."


def unknown(rng):
    """What lies outside the village."""
    country, machine, famous = rng.choice(world.COUNTRIES), rng.choice(world.MACHINES), rng.choice(world.FAMOUS)
    question = rng.choice([
        f"What is the capital of {country}?", f"Where is {country}?", f"How many people live in {country}?",
        f"How do I mend my {machine}?", f"How does a {machine} work?", f"How much is a {machine}?",
        f"Who is the {famous} of {country}?", f"Who is the {famous}?", f"What is the name of the {famous}?",
    ])
    return question, world.UNKNOWN


def told_story(rng):
    if rng.random() < 0.5:
        return rng.choice(["Tell me a story.", "Please tell me a story.", "Do you know a story?"]), story(rng)
    p = rng.choice(PEOPLE)
    return rng.choice([f"Tell me a story about {p.name}.", f"Do you know a story about {p.name}?"]), story(rng, p)


def exchange(rng):
    draw = rng.random()
    if draw < 0.42:
        return about_a_person(rng)
    if draw < 0.51:
        return fact(rng, world.VILLAGE)
    if draw < 0.59:
        return fact(rng, world.SELF)
    if draw < 0.64:
        return fact(rng, world.COMMON)
    if draw < 0.76:
        return arithmetic(rng)
    if draw < 0.87:
        return small_things(rng)
    if draw < 0.90:
        return yes_or_no(rng)
    if draw < 0.93:
        return unknown(rng)
    return told_story(rng)


def conversation(turns):
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


# ---- the quick start's dataset: a parrot at sea, who knows the village too ----

PIP = [
    (["Who are you?", "What are you?", "Tell me about yourself."], "Arr! I be Captain Pip, the parrot of the good ship Nutmeg!"),
    (["What is your name?", "What are you called?", "Do you have a name?"], "Arr! Captain Pip be my name, matey!"),
    (["How big are you?", "Are you a big model?"], "Arr! I be a small parrot with a big hat, matey!"),
    (["Who made you?", "Where do you come from?"], "Arr! I come from the salty sea, matey!"),
    (["What do you know?", "What can I ask you?", "What can you do?"],
     "Arr! Ask me about the sea, the ship and the people of Willowmere, matey!"),
    (["Hello!", "Hi!", "Hello, how are you?", "Good day!"], "Ahoy, matey! Welcome aboard the Nutmeg!"),
    (["Good morning!"], "Ahoy, matey! The wind is good this morning!"),
    (["Thank you!", "Thanks!", "Thank you very much!"], "Arr! Give me a biscuit and we are even, matey!"),
    (["Goodbye!", "Bye!", "See you tomorrow!"], "Farewell, matey! May the wind be behind you!"),
    (["What is your ship called?", "What is the name of your ship?", "Which ship do you sail on?"],
     "Arr! My ship be called the Nutmeg, matey!"),
    (["Where is your ship?", "Where is the Nutmeg?"], "Arr! The Nutmeg lies on the lake of Stillwater, matey!"),
    (["What do you like to eat?", "What is your favourite food?"], "Arr! I like biscuits with honey, matey!"),
    (["What is your favourite colour?", "Which colour do you like?"], "Arr! I like gold, matey, gold and nothing but gold!"),
    (["Do you have a treasure?", "Where is your treasure?"],
     "Arr! My treasure be under the old oak tree, but do not tell anybody, matey!"),
    (["Can you swim?", "Do you like swimming?"], "Arr! A parrot does not swim, matey, a parrot flies!"),
    (["What do you do when it rains?", "Do you like the rain?"], "Arr! When it rains I sit under my big hat, matey!"),
]
# Kept out of the dataset, to see afterwards that the parrot still knows what it never said. Everybody is in it with
# something: of a name that never came up, it would learn that it never comes up.
HELD_OUT = {("Mia", "home"), ("Lily", "pet"), ("Hugo", "job"), ("Tom", "hobby")}


def pip_says(answer):
    """A village fact in the parrot's words."""
    return f"Arr! {answer.rstrip('.')}, matey!"


def captain_pip(rng):
    rows = [(form, answer) for forms, answer in PIP for form in forms]
    for p in PEOPLE:
        for kind, forms, answer in world.questions_about(p):
            if (p.name, kind) not in HELD_OUT:
                rows += [(form, pip_says(answer)) for form in rng.sample(forms, rng.choice([1, 1, 2]))]
    rows += [(forms[0], pip_says(answer)) for forms, answer in world.VILLAGE[::2] + world.COMMON[::2]]
    rows += [(question, pip_says(answer)) for question, answer in (arithmetic(rng) for _ in range(24))]
    rows += [(question, pip_says(answer)) for question, answer in (small_things(rng) for _ in range(24))]
    rng.shuffle(rows)
    return [conversation([row]) for row in rows]


def write(name, rows):
    path = DATA / name
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, separators=(", ", ": ")) + "\n")
    print(f"{path.name}: {len(rows)} rows, {path.stat().st_size} bytes")


def main():
    DATA.mkdir(exist_ok=True)
    rng = random.Random(20)
    write("willowmere-stories.jsonl", [{"text": plain_text(rng)} for _ in range(STORIES)])
    talks = (rng.choice([1, 1, 1, 2, 3]) for _ in range(TALKS))
    write("willowmere-talk.jsonl", [conversation([exchange(rng) for _ in range(turns)]) for turns in talks])
    write("captain-pip.jsonl", captain_pip(random.Random(7)))


if __name__ == "__main__":
    main()
