"""A generator of short English paragraphs for the embedded model.

The text is drawn from a probabilistic grammar over a small fixed world. Reading it well takes more
than the last word or two:

- agreement over a distance: prepositional phrases and relative clauses stand between a subject and
  its verb (``The dogs near the gate that see the cow wait alone.``), and the pronouns and forms of
  ``do`` that follow agree as well;
- people recur in a paragraph under their names and the right pronouns, their things keep colour and
  owner, and questions at the end ask for what was said before;
- verses and rows of digits are repeated word for word;
- sums, differences, counting, weekdays and comparisons are consistent;
- a few dozen facts never change (capitals, languages, animals' sounds, colours, who lives where)
  and can be learned by heart.

Everything is drawn from a `random.Random` that the caller seeds, so a seed fixes the text. A
paragraph is one line and holds one scene, sometimes introduced by a remark on a fact.
"""

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple


class Person(NamedTuple):
    """Somebody of the fixed world."""

    name: str
    subject: str
    object: str
    possessive: str
    city: str
    job: str


class Country(NamedTuple):
    """A country, its capital and what is spoken there."""

    name: str
    capital: str
    language: str


def _she(name: str, city: str, job: str) -> Person:
    return Person(name, "she", "her", "her", city, job)


def _he(name: str, city: str, job: str) -> Person:
    return Person(name, "he", "him", "his", city, job)


PEOPLE = (
    _she("Anna", "Paris", "baker"),
    _he("Tom", "Rome", "farmer"),
    _she("Mia", "Madrid", "doctor"),
    _he("Peter", "Warsaw", "teacher"),
    _she("Lena", "Stockholm", "sailor"),
    _he("Max", "Athens", "painter"),
    _she("Olga", "Oslo", "pilot"),
    _he("Hugo", "Tokyo", "cook"),
    _she("Clara", "Paris", "singer"),
    _he("Felix", "Rome", "baker"),
    _she("Nora", "Madrid", "teacher"),
    _he("Oscar", "Warsaw", "sailor"),
    _she("Ruth", "Stockholm", "farmer"),
    _he("Simon", "Athens", "doctor"),
    _she("Vera", "Oslo", "painter"),
    _he("Leo", "Tokyo", "singer"),
)
COUNTRIES = (
    Country("France", "Paris", "French"),
    Country("Italy", "Rome", "Italian"),
    Country("Spain", "Madrid", "Spanish"),
    Country("Poland", "Warsaw", "Polish"),
    Country("Sweden", "Stockholm", "Swedish"),
    Country("Greece", "Athens", "Greek"),
    Country("Norway", "Oslo", "Norwegian"),
    Country("Japan", "Tokyo", "Japanese"),
)
SOUNDS = {
    "dog": "woof",
    "cat": "meow",
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "pig": "oink",
    "horse": "neigh",
    "owl": "hoot",
    "mouse": "squeak",
    "frog": "ribbit",
}
LEGS = {"bird": 2, "dog": 4, "horse": 4, "ant": 6, "spider": 8, "duck": 2, "bee": 6}
HUES = {
    "snow": "white",
    "grass": "green",
    "coal": "black",
    "a lemon": "yellow",
    "blood": "red",
    "the sea": "blue",
    "chocolate": "brown",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "old": "young",
    "fast": "slow",
    "long": "short",
    "dark": "bright",
    "full": "empty",
}
ORDERS = {
    "taller": ("tallest", "shortest", "tall"),
    "older": ("oldest", "youngest", "old"),
    "faster": ("fastest", "slowest", "fast"),
    "stronger": ("strongest", "weakest", "strong"),
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "orange")
THINGS = (
    "kite",
    "hat",
    "ball",
    "book",
    "key",
    "coat",
    "cup",
    "bag",
    "lamp",
    "ring",
    "drum",
    "scarf",
)
COUNTED = ("apple", "pear", "plum", "egg", "cake", "lemon", "nut", "rose")
CONTAINERS = ("box", "drawer", "basket", "bottle", "chest", "pot", "cupboard", "bucket")
PLACES = (
    "river",
    "bridge",
    "barn",
    "gate",
    "tower",
    "garden",
    "market",
    "church",
    "forest",
    "school",
    "mill",
    "well",
)
CREATURES = (
    ("dog", "dogs"),
    ("cat", "cats"),
    ("cow", "cows"),
    ("horse", "horses"),
    ("duck", "ducks"),
    ("pig", "pigs"),
    ("boy", "boys"),
    ("girl", "girls"),
    ("child", "children"),
    ("man", "men"),
    ("woman", "women"),
    ("mouse", "mice"),
    ("owl", "owls"),
    ("goose", "geese"),
)
ACTIONS = (
    ("runs", "run"),
    ("sleeps", "sleep"),
    ("waits", "wait"),
    ("jumps", "jump"),
    ("eats", "eat"),
    ("hides", "hide"),
    ("walks", "walk"),
    ("stands", "stand"),
    ("plays", "play"),
    ("sings", "sing"),
)
RELATIONS = (
    ("sees", "see"),
    ("hears", "hear"),
    ("follows", "follow"),
    ("likes", "like"),
    ("fears", "fear"),
    ("knows", "know"),
)
ADJECTIVES = (
    "old",
    "young",
    "small",
    "big",
    "tired",
    "happy",
    "hungry",
    "quiet",
    "brave",
    "clever",
)
STATES = ("tired", "happy", "hungry", "quiet", "cold", "wet", "warm", "safe")
ADVERBS = (
    "slowly",
    "quietly",
    "again",
    "every morning",
    "all day",
    "at night",
    "alone",
    "in the rain",
)
OPENERS = (
    "One morning",
    "On a cold day",
    "Last summer",
    "After lunch",
    "Early in the evening",
    "One night",
    "On a windy day",
    "Before breakfast",
)
VERSE = (
    "moon",
    "stone",
    "bird",
    "fire",
    "rain",
    "tree",
    "star",
    "wind",
    "leaf",
    "snow",
    "road",
    "bell",
    "ship",
    "wolf",
)
SPECIES = ("dog", "cat", "cow", "duck", "pig", "horse", "owl", "mouse", "frog")
PETS = ("Rex", "Luna", "Bella", "Rocky", "Daisy", "Milo", "Ruby", "Toby")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def _country_of(city: str) -> Country:
    return next(country for country in COUNTRIES if country.capital == city)


def _near(rng: random.Random) -> str:
    return f"{rng.choice(('near', 'behind', 'by', 'in front of'))} the {rng.choice(PLACES)}"


def _opened(rng: random.Random, sentence: str) -> str:
    """Put a time in front of a sentence that starts with a name, half of the time."""
    return f"{rng.choice(OPENERS)} {sentence}" if rng.random() < 0.5 else sentence


def _aside(rng: random.Random, person: Person) -> str:
    """Name somebody, with a relative clause on a fact of the fixed world a third of the time."""
    draw = rng.random()
    if draw < 0.12:
        return f"{person.name}, who lives in {person.city},"
    if draw < 0.24:
        return f"{person.name}, {_a(person.job)} from {person.city},"
    if draw < 0.34:
        return f"{person.name}, who speaks {_country_of(person.city).language},"
    return person.name


def _fact(rng: random.Random) -> str:
    """State a fact of the fixed world."""
    country, person = rng.choice(COUNTRIES), rng.choice(PEOPLE)
    match rng.randrange(9):
        case 0:
            return f"The capital of {country.name} is {country.capital}."
        case 1:
            return (
                f"{country.capital} is the capital of {country.name}, "
                f"and people there speak {country.language}."
            )
        case 2:
            animal = rng.choice(tuple(SOUNDS))
            return f"The {animal} says {SOUNDS[animal]}."
        case 3:
            animal = rng.choice(tuple(LEGS))
            return f"{_capital(_a(animal))} has {NUMBERS[LEGS[animal]]} legs."
        case 4:
            thing = rng.choice(tuple(HUES))
            return f"{_capital(thing)} is {HUES[thing]}."
        case 5:
            word = rng.choice(tuple(OPPOSITES))
            return f"The opposite of {word} is {OPPOSITES[word]}."
        case 6:
            return f"{person.name} is {_a(person.job)} and lives in {person.city}."
        case 7:
            home = _country_of(person.city)
            return (
                f"{person.name} lives in {home.name}, so {person.subject} speaks {home.language}."
            )
        case _:
            day = rng.randrange(7)
            return f"The day after {DAYS[day]} is {DAYS[(day + 1) % 7]}."


def _lost(rng: random.Random) -> list[str]:
    owner, finder = rng.sample(PEOPLE, 2)
    colour, other = rng.sample(COLOURS, 2)
    subject = _capital(owner.subject)
    thing, (lost_at, looked_at, found_at) = rng.choice(THINGS), rng.sample(PLACES, 3)
    sentences = [
        _opened(
            rng,
            f"{_aside(rng, owner)} lost {owner.possessive} {colour} {thing} near the {lost_at}.",
        ),
        rng.choice(
            (
                f"{subject} looked behind the {looked_at}, but the {thing} was not there.",
                f"{subject} asked everybody at the {looked_at}, but nobody knew.",
                f"{subject} went home and was sad about {owner.possessive} {thing}.",
            )
        ),
        f"Then {_aside(rng, finder)} found {_a(f'{colour} {thing}')} by the {found_at}.",
    ]
    if rng.random() < 0.5:
        sentences += [
            f'"Is this your {thing}?" asked {finder.name}.',
            f'"Yes, my {thing} is {colour}," said {owner.name}.',
        ]
    else:
        sentences += [
            f'"Is your {thing} {other}?" asked {finder.name}.',
            f'"No, my {thing} is {colour}," said {owner.name}.',
            f"So {finder.name} gave the {colour} {thing} back to {owner.name}.",
        ]
    sentences.append(
        f"{owner.name} thanked {finder.name} and took {owner.possessive} {thing} home."
    )
    questions = (
        f"What colour was the {thing}? It was {colour}.",
        f"Who found the {thing}? {finder.name} found it by the {found_at}.",
        f"Where did {owner.name} lose the {thing}? Near the {lost_at}.",
        f"Whose {thing} was it? It was the {thing} of {owner.name}.",
    )
    return sentences + rng.sample(questions, rng.randint(1, 3))


def _shopping(rng: random.Random) -> list[str]:
    buyer, friend = rng.sample(PEOPLE, 2)
    first, second = rng.sample(COUNTED, 2)
    many, more = rng.randint(2, 9), rng.randint(1, 9)
    given = rng.randint(1, many - 1)
    left = many - given
    goods = f"{many} {_plural(first, many)} and {more} {_plural(second, more)}"
    subject = _capital(buyer.subject)
    sentences = [
        _opened(
            rng,
            f"{_aside(rng, buyer)} bought {goods} at the {rng.choice(('market', 'shop', 'farm'))}.",
        ),
        f"{goods} make {many + more} pieces.",
        f"{subject} gave {given} {_plural(first, given)} to {friend.name}.",
        f"{many} minus {given} is {left}, so {buyer.name} has {left} {_plural(first, left)} left.",
    ]
    questions = (
        f"How many {second}s did {buyer.name} buy? {subject} bought {more}.",
        f"How many {first}s does {friend.name} have now? {_capital(friend.subject)} has {given}.",
        f"Does {buyer.name} have more {first}s than {second}s now? "
        + ("Yes." if left > more else "No." if left < more else "No, as many."),
        f"How many pieces does {buyer.name} have now? {left} plus {more} is {left + more}.",
    )
    return sentences + rng.sample(questions, rng.randint(1, 3))


def _owners(rng: random.Random) -> list[str]:
    count = rng.randint(3, 4)
    people, colours = rng.sample(PEOPLE, count), rng.sample(COLOURS, count)
    things = rng.sample(THINGS, count)
    held = list(zip(people, colours, things, strict=True))
    sentences = []
    for person, colour, thing in held:
        sentences.append(
            rng.choice(
                (
                    f"{_aside(rng, person)} has {_a(f'{colour} {thing}')}.",
                    f"The {colour} {thing} belongs to {person.name}.",
                    f"{_aside(rng, person)} keeps {_a(f'{colour} {thing}')} {_near(rng)}.",
                )
            )
        )
    sentences.append(f"{rng.choice(('Listen', 'Think', 'Now answer'))}.")
    for person, colour, thing in rng.sample(held, rng.randint(2, 3)):
        sentences.append(
            rng.choice(
                (
                    f"What colour is the {thing}? The {thing} is {colour}.",
                    f"What is {colour}? The {thing} that {person.name} has is {colour}.",
                    f"Who has the {thing}? {person.name} has the {colour} {thing}.",
                    f"Is the {colour} thing {_a(thing)}? Yes, it is the {thing} of {person.name}.",
                )
            )
        )
    return sentences


def _moved(rng: random.Random) -> list[str]:
    first, second, third = rng.sample(PEOPLE, 3)
    here, there, last = rng.sample(CONTAINERS, 3)
    thing, other = rng.sample(THINGS, 2)
    subject = _capital(first.subject)
    absence = f"{first.name} was {rng.choice(('asleep', 'away', 'in the garden', 'at school'))}"
    sentences = [
        _opened(
            rng,
            f"{_aside(rng, first)} put the {thing} in the {here} and the {other} in the {last}.",
        ),
        f"While {absence}, {_aside(rng, second)} moved the {thing} from the {here} to the {there}.",
    ]
    if rng.random() < 0.5:
        sentences.append(f"{third.name} saw {second.object} and said nothing.")
    else:
        sentences.append(
            f'"Where is my {thing}?" asked {first.name} when {first.subject} came back.'
        )
    place = there
    if rng.random() < 0.4:
        sentences.append(
            f"Then {third.name} took the {thing} out of the {there} and put it in the {last}."
        )
        place = last
    questions = (
        f"Where is the {thing} now? It is in the {place}.",
        f"Where is the {other}? It is in the {last}.",
        f"Where does {first.name} look for the {thing}? {subject} looks in the {here}.",
        f"Who moved the {thing} to the {there}? {second.name} did.",
    )
    return sentences + rng.sample(questions, rng.randint(2, 3))


def _compared(rng: random.Random) -> list[str]:
    a, b, c = rng.sample(PEOPLE, 3)
    order = rng.choice(tuple(ORDERS))
    most, least, plain = ORDERS[order]
    sentences = [
        f"{_aside(rng, a)} is {order} than {b.name}.",
        f"{_aside(rng, b)} is {order} than {c.name}.",
    ]
    if rng.random() < 0.5:
        sentences.reverse()
    sentences.append(f"So {a.name} is {order} than {c.name} too.")
    if rng.random() < 0.5:
        sentences.append(
            f'"I am not as {plain} as {a.name}," said {c.name}, "but I am {rng.choice(STATES)}."'
        )
    questions = (
        f"Who is the {most} of the three? {a.name} is the {most}.",
        f"Who is the {least}? The {least} is {c.name}.",
        f"Is {c.name} {order} than {b.name}? No, {b.name} is {order} than {c.name}.",
        f"Is {a.name} {order} than {b.name}? Yes, {a.subject} is.",
    )
    return sentences + rng.sample(questions, rng.randint(2, 3))


def _counted(rng: random.Random) -> list[str]:
    person = rng.choice(PEOPLE)
    subject = _capital(person.subject)
    noun, count = rng.choice(COUNTED), rng.randint(3, 12)
    up, down = ", ".join(NUMBERS[1 : count + 1]), ", ".join(reversed(NUMBERS[1 : count + 1]))
    sentences = [
        _opened(
            rng, f"{_aside(rng, person)} counted the {noun}s in the {rng.choice(CONTAINERS)}: {up}."
        ),
        f"There were {NUMBERS[count]} {noun}s.",
    ]
    if rng.random() < 0.4:
        sentences.append(f"Then {person.subject} counted back: {down}.")
    if count < 12:
        sentences.append(
            f"{subject} put one more {noun} in, and then there were {NUMBERS[count + 1]}."
        )
    day = rng.randrange(7)
    sentences.append(
        f'"Today is {DAYS[day]}," said {person.name}, "so tomorrow is {DAYS[(day + 1) % 7]} '
        f'and yesterday was {DAYS[(day - 1) % 7]}."'
    )
    return sentences


def _modifier(rng: random.Random, plural: bool, depth: int) -> str:
    """Stand between a subject and its verb; the nouns in it often have the other number."""
    other = rng.random() < 0.5
    noun = rng.choice(CREATURES)[other]
    relation = rng.choice(RELATIONS)
    match rng.randrange(4):
        case 0:
            return _near(rng)
        case 1:
            inner = f" {_modifier(rng, other, depth - 1)}" if depth > 1 else ""
            return f"{rng.choice(('with', 'behind', 'near'))} the {noun}{inner}"
        case 2:
            inner = f" {_near(rng)}" if rng.random() < 0.3 else ""
            return f"that {relation[plural]} the {noun}{inner}"
        case _:
            return f"that the {noun} {relation[other]}"


def _field(rng: random.Random) -> list[str]:
    sentences = []
    for creature in rng.sample(CREATURES, rng.randint(2, 3)):
        plural = rng.random() < 0.5
        noun, action, second = creature[plural], *rng.sample(ACTIONS, 2)
        adjective = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.4 else ""
        subject = f"The {adjective}{noun} {_modifier(rng, plural, 2)}"
        verb, adverb = action[plural], rng.choice(ADVERBS)
        if rng.random() < 0.6:
            sentences.append(f"{subject} {verb} {adverb}.")
        else:
            sentences.append(f"{subject} {verb} {adverb} and {second[plural]} {_near(rng)}.")
        state = rng.choice(STATES)
        pronoun, be, do = ("They", "are", "do") if plural else ("It", "is", "does")
        if creature[0] in ("boy", "man") and not plural:
            pronoun = "He"
        if creature[0] in ("girl", "woman") and not plural:
            pronoun = "She"
        sentences.append(
            f"{pronoun} {be} {rng.choice(('very', 'not', 'always', 'a little'))} {state}."
        )
        if rng.random() < 0.6:
            who = "Who" if creature[0] in ("boy", "girl", "child", "man", "woman") else "What"
            sentences.append(f"{who} {action[0]} {adverb}? The {noun} {do}.")
    return sentences


def _lesson(rng: random.Random) -> list[str]:
    teacher, *pupils = rng.sample(PEOPLE, 3)
    sentences = [
        _opened(rng, f"{teacher.name} asked {pupils[0].name} and {pupils[1].name} some questions.")
    ]
    for turn in range(rng.randint(3, 4)):
        pupil = pupils[turn % 2]
        country = rng.choice(COUNTRIES)
        match rng.randrange(6):
            case 0:
                question, answer = f"What is the capital of {country.name}", country.capital
            case 1:
                question, answer = f"What do people speak in {country.name}", country.language
            case 2:
                animal = rng.choice(tuple(SOUNDS))
                question, answer = f"What does the {animal} say", _capital(SOUNDS[animal])
            case 3:
                animal = rng.choice(tuple(LEGS))
                question, answer = (
                    f"How many legs does {_a(animal)} have",
                    _capital(NUMBERS[LEGS[animal]]),
                )
            case 4:
                thing = rng.choice(tuple(HUES))
                question, answer = f"What colour is {thing}", _capital(HUES[thing])
            case _:
                left, right = rng.randint(1, 9), rng.randint(1, 9)
                question, answer = f"What is {left} plus {right}", str(left + right)
        sentences.append(f'"{question}?" asked {teacher.name}. "{answer}," said {pupil.name}.')
    praise = rng.choice(("Very good", "Well done", "That is right"))
    sentences.append(f'"{praise}, {pupils[0].name} and {pupils[1].name}," said {teacher.name}.')
    return sentences


def _journey(rng: random.Random) -> list[str]:
    person = rng.choice(PEOPLE)
    home = _country_of(person.city)
    away = rng.choice([country for country in COUNTRIES if country != home])
    host = rng.choice([other for other in PEOPLE if other.city == away.capital])
    days, start = rng.randint(1, 5), rng.randrange(7)
    stay, end = f"{NUMBERS[days]} {_plural('day', days)}", DAYS[(start + days) % 7]
    subject = _capital(person.subject)
    sentences = [
        _opened(
            rng, f"{person.name}, {_a(person.job)} from {home.capital}, travelled to {away.name}."
        ),
        f"{subject} speaks {home.language}, but in {away.capital} people speak {away.language}.",
        f"There {person.subject} met {host.name}, who is {_a(host.job)}.",
        f"{person.name} came on {DAYS[start]}, stayed for {stay} and left on {end}.",
    ]
    questions = (
        f"Where does {host.name} live? {_capital(host.subject)} lives in {away.capital}.",
        f"Where does {person.name} live? {subject} lives in {home.capital}.",
        f"When did {person.name} leave {away.name}? On {end}.",
        f"What does {host.name} speak? {_capital(host.subject)} speaks {away.language}.",
    )
    return sentences + rng.sample(questions, rng.randint(1, 3))


def _passed_on(rng: random.Random) -> list[str]:
    people = rng.sample(PEOPLE, rng.randint(3, 5))
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    sentences = [_opened(rng, f"{_aside(rng, people[0])} had {_a(f'{colour} {thing}')}.")]
    for giver, taker in pairwise(people):
        sentences.append(
            rng.choice(
                (
                    f"{giver.name} gave the {thing} to {taker.name}.",
                    f"Then {taker.name} got it from {giver.name} {_near(rng)}.",
                    f'"Please take my {thing}," said {giver.name}. {taker.name} took it.',
                )
            )
        )
    last, before = people[-1], people[-2]
    questions = (
        f"Who has the {thing} now? {last.name} has the {colour} {thing}.",
        f"Who had the {thing} first? {people[0].name} had it first.",
        f"From whom did {last.name} get it? From {before.name}.",
        f"What did {before.name} give away? The {colour} {thing}.",
    )
    return sentences + rng.sample(questions, rng.randint(2, 3))


def _recited(rng: random.Random) -> list[str]:
    first, second = rng.sample(PEOPLE, 2)
    if rng.random() < 0.6:
        words = rng.sample(VERSE, rng.randint(4, 8))
        verse = ", ".join(words)
        spot = rng.randrange(len(words) - 1)
        return [
            _opened(rng, f'{_aside(rng, first)} sang {_near(rng)}: "{verse}."'),
            f'{_aside(rng, second)} liked the song and sang it too: "{verse}."',
            f'What comes after "{words[spot]}" in the song? It is "{words[spot + 1]}".',
            f'The song of {first.name} begins with "{words[0]}" and ends with "{words[-1]}".',
        ]
    digits = " ".join(str(rng.randint(1, 9)) for _ in range(rng.randint(4, 7)))
    return [
        _opened(rng, f"{_aside(rng, first)} wrote the number {digits} in {first.possessive} book."),
        f'"Can you read it to me?" {first.subject} asked {second.name}.',
        f'"{digits}," read {second.name}.',
        f"Later {second.name} told {first.object} the number again: {digits}.",
    ]


def _pets(rng: random.Random) -> list[str]:
    owners, kinds = rng.sample(PEOPLE, 2), rng.sample(SPECIES, 2)
    names, colours = rng.sample(PETS, 2), rng.sample(COLOURS, 2)
    held = list(zip(owners, kinds, names, colours, strict=True))
    sentences = [
        _opened(rng, f"{_aside(rng, owner)} got {_a(f'{colour} {kind}')} called {name}.")
        for owner, kind, name, colour in held
    ]
    for owner, kind, name, _ in rng.sample(held, 2):
        sentences.append(
            rng.choice(
                (
                    f"{name} is {_a(kind)}, so {name} says {SOUNDS[kind]}.",
                    f"The {kind} likes {owner.name} and sleeps {_near(rng)}.",
                    f"{owner.name} plays with {owner.possessive} {kind} {rng.choice(ADVERBS)}.",
                )
            )
        )
    for owner, kind, name, colour in rng.sample(held, 2):
        sentences.append(
            rng.choice(
                (
                    f"What does {name} say? {name} says {SOUNDS[kind]}.",
                    f"What colour is {name}? {name} is {colour}.",
                    f"Whose pet is {name}? {name} is the {kind} of {owner.name}.",
                    f"What is the name of the {kind}? Its name is {name}.",
                )
            )
        )
    return sentences


SCENES: tuple[Callable[[random.Random], list[str]], ...] = (
    _lost,
    _shopping,
    _owners,
    _moved,
    _compared,
    _counted,
    _field,
    _lesson,
    _journey,
    _passed_on,
    _recited,
    _pets,
)


def paragraph(rng: random.Random) -> str:
    """Draw one paragraph.

    Parameters
    ----------
    rng : random.Random
        The source of all choices; its state moves on.

    Returns
    -------
    str
        One line of about 20 to 120 words, without a line break.
    """
    sentences = rng.choice(SCENES)(rng)
    if rng.random() < 0.25:
        sentences.insert(0, _fact(rng))
    return " ".join(sentences)


def corpus(seed: int, n: int) -> Iterator[str]:
    """Draw `n` paragraphs from a generator seeded with `seed`."""
    rng = random.Random(seed)
    for _ in range(n):
        yield paragraph(rng)
