"""The common words of miniworld: everything that is not a name."""

PROFESSIONS = (
    "judge doctor teacher farmer baker painter writer singer dancer lawyer nurse pilot "
    "sailor soldier tailor carpenter plumber banker barber butcher chemist cook gardener waiter"
).split()
INSTRUMENTS = (
    "violin piano guitar flute harp drum trumpet cello banjo horn lute tuba clarinet fiddle organ mandolin".split()
)
SPORTS = (
    "tennis boxing hockey rugby chess golf cricket football basketball swimming cycling rowing wrestling fencing "
    "skating judo"
).split()
FOODS = (
    "bread rice cheese soup cake honey fish beef pasta salad beans corn butter pie stew cabbage lentils noodles "
    "pancakes olives"
).split()
PRODUCTS = (
    "steel glass paper shoes clocks cars bicycles radios carpets candles boats bricks toys cameras furniture hats "
    "pens tiles pumps ropes engines paint needles mirrors"
).split()
SIGHTS = (
    "bridges castles museums towers temples beaches canals fountains theatres mines vineyards stadiums lakes walls "
    "harbours festivals caves statues"
).split()
CURRENCIES = "crown florin mark peso shilling ducat thaler franc dinar rand lira guilder".split()

NOUNS = (
    "lamp table chair book letter box basket coat hat ring cup plate knife bottle mirror clock map key bell candle "
    "blanket carpet ladder hammer rope wheel cart boat kite drumstick coin stamp photo ticket umbrella scarf glove "
    "boot pillow bucket"
).split()
PLACES = (
    "market harbour kitchen garden library station school church bridge farm forest river square tower mill inn bakery "
    "theatre museum hospital"
).split()
ADJECTIVES = (
    "old new red green blue small large heavy light bright dark warm cold clean dusty round square soft hard cheap "
    "plain strange narrow wide quiet broken modern ancient empty full"
).split()
VERBS_PAST = {
    "sold": "sell", "bought": "buy", "found": "find", "lost": "lose", "carried": "carry", "painted": "paint",
    "repaired": "repair", "cleaned": "clean", "opened": "open", "moved": "move", "borrowed": "borrow",
    "dropped": "drop", "hid": "hide", "watched": "watch", "wrapped": "wrap", "counted": "count",
}  # fmt: skip
POSITIVE = "wonderful lovely great excellent charming perfect brilliant delightful superb splendid".split()
NEGATIVE = "terrible awful horrible boring dreadful poor ugly disappointing miserable useless".split()
LIKED = "loved enjoyed admired praised".split()
DISLIKED = "hated regretted disliked avoided".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen"
).split()
COUNTABLE = "apples coins books lamps rings stamps tickets bottles keys candles shells eggs".split()

# What one does with a thing: the coherent endings of the four-way completion task.
ENDINGS = {
    "violin": ["played a slow song", "tuned the four strings", "played it for the guests"],
    "book": ["read the first page", "turned to the last chapter", "read it until midnight"],
    "ball": ["kicked it over the wall", "threw it to the children", "kicked it into the net"],
    "knife": ["cut the bread in half", "sliced the onions", "cut a piece of rope"],
    "brush": ["painted the old door", "painted the fence white", "swept the colour over the wall"],
    "pen": ["wrote a long letter", "signed the paper", "wrote down the address"],
    "spoon": ["stirred the soup", "tasted the stew", "stirred the tea slowly"],
    "broom": ["swept the kitchen floor", "swept the leaves away", "cleaned the dusty stairs"],
    "axe": ["chopped the wood", "split the heavy log", "chopped down the tree"],
    "kettle": ["boiled some water", "made a cup of tea", "filled it with water"],
    "telephone": ["called an old friend", "dialled the number", "asked who was calling"],
    "needle": ["sewed the torn coat", "mended the shirt", "sewed on a button"],
    "camera": ["took a photo of the bridge", "photographed the guests", "took a picture of the lake"],
    "spade": ["dug a deep hole", "planted a tree", "dug up the potatoes"],
    "key": ["unlocked the front door", "locked the heavy gate", "opened the old safe"],
    "saddle": ["rode the horse to the farm", "put it on the horse", "rode away on the horse"],
}

LISTS = (
    PROFESSIONS, INSTRUMENTS, SPORTS, FOODS, PRODUCTS, SIGHTS,
    CURRENCIES, NOUNS, PLACES, ADJECTIVES, NUMBERS, COUNTABLE,
)  # fmt: skip
