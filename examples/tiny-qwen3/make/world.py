"""The made-up village that the tiny model knows: its people, its places and its small facts.

Everything here was written for this project. Other modules turn it into sentences; nothing here is random.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    name: str
    woman: bool
    job: str
    home: str
    pet: str
    pet_name: str
    colour: str
    food: str
    hobby: str
    friend: str
    does: str  # what the job is, after "she" or "he"

    @property
    def subject(self):
        return "she" if self.woman else "he"

    @property
    def possessive(self):
        return "her" if self.woman else "his"

    @property
    def object(self):
        return "her" if self.woman else "him"


def _person(line):
    fields = [field.strip() for field in line.split("|")]
    name, woman, job, home, pet, pet_name, colour, food, hobby, friend, does = fields
    return Person(name, woman == "she", job, home, pet, pet_name, colour, food, hobby, friend, does)


PEOPLE = [
    _person(line)
    for line in """
    Mia   | she | miller    | in the old mill by the river       | goose    | Button  | yellow | plum cake        | flying kites      | Ben   | grinds the corn
    Ben   | he  | baker     | above the bakery                   | cat      | Crumb   | brown  | honey bread      | playing the flute | Mia   | bakes the bread
    Anna  | she | teacher   | in the house beside the school     | rabbit   | Clover  | green  | apple pie        | reading           | Ruth  | teaches the children
    Tom   | he  | fisher    | in a boat on the lake              | otter    | Splash  | blue   | fried fish       | swimming          | Otto  | catches fish
    Clara | she | doctor    | in the white house on the hill     | dog      | Biscuit | white  | carrot soup      | growing roses     | Vera  | helps people who are ill
    Otto  | he  | smith     | behind the smithy                  | donkey   | Rusty   | black  | potato soup      | telling jokes     | Tom   | makes nails and hammers
    Ruth  | she | gardener  | in the cottage with the red door   | hen      | Pepper  | red    | pea soup         | watching birds    | Anna  | grows beans and flowers
    Finn  | he  | shepherd  | in the hut on the high meadow      | sheep    | Cloud   | grey   | goat cheese      | carving wood      | Greta | looks after the sheep
    Ivy   | she | painter   | in the tower at the edge of the wood | owl    | Moon    | purple | blueberry jam    | looking at stars  | Hugo  | paints pictures
    Hugo  | he  | carpenter | in the barn at the end of the lane | mouse    | Splinter | orange | nut bread       | dancing           | Ivy   | builds tables and chairs
    Nora  | she | weaver    | over the wool shop                 | kitten   | Thread  | pink   | pancakes         | singing           | Paul  | makes warm blankets
    Paul  | he  | postman   | next to the post office            | pony     | Arrow   | silver | cherry pie       | running           | Nora  | brings the letters
    Vera  | she | beekeeper | in the garden house                | tortoise | Amber   | gold   | toast with honey | drawing maps      | Clara | keeps forty hives of bees
    Sam   | he  | cook      | in the inn at the market           | pig      | Dumpling | cream | onion tart       | playing cards     | Rosa  | cooks for the whole inn
    Rosa  | she | tailor    | in the narrow house by the well    | parrot   | Ribbon  | violet | rice pudding     | riding            | Sam   | sews coats and dresses
    Emil  | he  | clockmaker | under the clock tower             | snail    | Minute  | copper | cheese rolls     | collecting stamps | Lily  | mends the clocks
    Lily  | she | librarian | in the room above the library      | hamster  | Comma   | lilac  | lemon cake       | writing poems     | Emil  | lends out the books
    Karl  | he  | ferryman  | in the hut at the ferry            | duck     | Captain | teal   | bean stew        | sailing           | Tilda | takes people over the river
    Tilda | she | potter    | in the round house on the green    | frog     | Puddle  | olive  | mushroom soup    | skating           | Karl  | makes cups and bowls
    Greta | she | dairymaid | in the farm on the south road      | cow      | Daisy   | lemon  | butter cakes     | climbing trees    | Finn  | milks the cows
    """.strip().splitlines()
]

BY_NAME = {person.name: person for person in PEOPLE}

# question forms -> answer; every question has several forms, so that the model learns the meaning, not one wording.
VILLAGE = [
    (["What is the name of the village?", "What is your village called?", "Which village do you know?"], "The village is called Willowmere."),
    (["Where is Willowmere?", "Where can I find Willowmere?"], "Willowmere lies in a green valley between the hills and the lake."),
    (["What is the river called?", "What is the name of the river?"], "The river is called the Reed."),
    (["What is the lake called?", "What is the name of the lake?"], "The lake is called Stillwater."),
    (["What is the wood called?", "What is the name of the wood?"], "The wood is called Owl Wood."),
    (["How many people live in Willowmere?", "How many people are in the village?"], "Twenty people live in Willowmere."),
    (["When is the market?", "On which day is the market?"], "The market is on Saturday."),
    (["What can I buy at the market?", "What do they sell at the market?"], "You can buy bread, fish, honey, cheese and warm blankets at the market."),
    (["What stands on the green?", "What can I see on the green?"], "An old oak tree stands on the green."),
    (["How old is the mill?", "When was the mill built?"], "The mill is two hundred years old."),
    (["What happens in spring?", "What is spring like?"], "In spring the snow melts and the lambs are born."),
    (["What happens in summer?", "What is summer like?"], "In summer the days are long and the children swim in the lake."),
    (["What happens in autumn?", "What is autumn like?"], "In autumn the leaves turn red and everybody picks apples."),
    (["What happens in winter?", "What is winter like?"], "In winter the lake freezes and Tilda skates on it."),
    (["How do I cross the river?", "How can I get over the river?"], "Karl the ferryman takes you over the river."),
    (["Is there a school in Willowmere?", "Does the village have a school?"], "Yes, there is a small school, and Anna is the teacher."),
    (["Is there a train?", "Does a train stop in Willowmere?"], "No, there is no train. You have to walk or take the ferry."),
    (["What is the biggest feast?", "What does the village celebrate?"], "The biggest feast is the Lantern Night, when lights float down the river."),
]

SELF = [
    (["Who are you?", "What are you?", "Tell me about yourself."], "I am Wren, a very small language model. I know the village of Willowmere."),
    (["What is your name?", "What are you called?", "Do you have a name?"], "My name is Wren."),
    (["How big are you?", "Are you a big model?"], "I am very small. I have only about one million numbers."),
    (["Who made you?", "Where do you come from?"], "I was trained by Muster, from nothing, in a few minutes."),
    (["What do you know?", "What can I ask you?", "What can you do?"], "You can ask me about the people of Willowmere, about animals and colours, and about small numbers."),
    (["What can you not do?", "Do you know everything?"], "I know only one village. About the rest of the world I know nothing."),
    (["Hello!", "Hi!", "Hello, how are you?", "Good day!"], "Hello! I am well. What would you like to know?"),
    (["Good morning!", "Good morning, Wren!"], "Good morning! What would you like to know?"),
    (["Thank you!", "Thanks!", "Thank you very much!"], "You are welcome."),
    (["Goodbye!", "Bye!", "See you tomorrow!"], "Goodbye! Come back soon."),
]

COMMON = [
    (["What do bees make?", "What do we get from bees?"], "Bees make honey."),
    (["What do cows give us?", "What do we get from cows?"], "Cows give us milk."),
    (["What do hens lay?", "What do we get from hens?"], "Hens lay eggs."),
    (["What do sheep give us?", "What do we get from sheep?"], "Sheep give us wool."),
    (["What colour is the sky?"], "The sky is blue."),
    (["What colour is the grass?"], "The grass is green."),
    (["What colour is the snow?"], "The snow is white."),
    (["What colour is the sun?"], "The sun is yellow."),
    (["What colour is the night?"], "The night is black."),
    (["What do I need when it rains?", "It is raining. What should I take?"], "Take an umbrella when it rains."),
    (["What do I need when it is cold?", "It is cold. What should I wear?"], "Wear a warm coat when it is cold."),
    (["I am hungry. What should I do?", "What should I do when I am hungry?"], "Eat some bread from the bakery."),
    (["I am tired. What should I do?", "What should I do when I am tired?"], "Go to bed and sleep well."),
    (["I am sad. What should I do?", "What should I do when I am sad?"], "Talk to a friend. That helps."),
]

OPPOSITES = [
    ("big", "small"), ("hot", "cold"), ("day", "night"), ("old", "young"), ("wet", "dry"), ("fast", "slow"),
    ("happy", "sad"), ("open", "closed"), ("high", "low"), ("light", "dark"), ("full", "empty"), ("long", "short"),
]

SOUNDS = [
    ("dog", "barks"), ("cat", "purrs"), ("cow", "moos"), ("duck", "quacks"), ("sheep", "bleats"), ("owl", "hoots"),
    ("frog", "croaks"), ("hen", "clucks"), ("pig", "grunts"), ("mouse", "squeaks"), ("donkey", "brays"), ("goose", "honks"),
]

UNKNOWN = "I do not know that. I know only Willowmere."
COUNTRIES = ["France", "Italy", "Spain", "China", "Kenya", "Peru", "Japan", "India", "Norway", "Egypt", "Brazil", "Greece"]
MACHINES = ["car", "phone", "computer", "train", "radio", "camera", "plane", "robot", "rocket", "bus"]
FAMOUS = ["king", "president", "queen", "singer", "actor", "captain of the team", "richest man", "mayor of the city"]

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SEASONS = ["spring", "summer", "autumn", "winter"]
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
]


def a(noun):
    """The noun with its article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def questions_about(person):
    """(kind, question forms, answer) for everything that is known about a person."""
    p = person
    return [
        ("home", [f"Where does {p.name} live?", f"Where is the home of {p.name}?", f"In which house does {p.name} live?", f"Where is {p.name}'s home?"],
         f"{p.name} lives {p.home}."),
        ("job", [f"What is the job of {p.name}?", f"What does {p.name} do?", f"What kind of work does {p.name} do?", f"What is {p.name}'s job?"],
         f"{p.name} is the {p.job} and {p.does}."),
        ("pet", [f"Does {p.name} have a pet?", f"What pet does {p.name} have?", f"Which animal lives with {p.name}?", f"What is {p.name}'s pet?"],
         f"{p.name} has {a(p.pet)} called {p.pet_name}."),
        ("colour", [f"What is the favourite colour of {p.name}?", f"Which colour does {p.name} like?", f"What is {p.name}'s favourite colour?"],
         f"{p.name} likes {p.colour} best."),
        ("food", [f"What does {p.name} like to eat?", f"What is the favourite food of {p.name}?", f"What is {p.name}'s favourite food?"],
         f"{p.name} likes {p.food} most of all."),
        ("hobby", [f"What does {p.name} like to do?", f"What does {p.name} do for fun?", f"What is {p.name}'s hobby?"],
         f"{p.name} likes {p.hobby}."),
        ("friend", [f"Who is the best friend of {p.name}?", f"Who is a good friend of {p.name}?", f"Who is {p.name}'s best friend?"],
         f"The best friend of {p.name} is {p.friend}."),
        ("who", [f"Who is {p.name}?", f"Do you know {p.name}?", f"Tell me about {p.name}."],
         f"{p.name} is the {p.job} of Willowmere. {p.subject.capitalize()} lives {p.home} with {p.possessive} {p.pet} {p.pet_name}."),
        ("by_job", [f"Who is the {p.job}?", f"Who {p.does}?", f"What is the name of the {p.job}?"],
         f"{p.name} is the {p.job} of Willowmere."),
        ("by_pet", [f"Who is {p.pet_name}?", f"Whose pet is {p.pet_name}?"],
         f"{p.pet_name} is the {p.pet} of {p.name}."),
    ]
