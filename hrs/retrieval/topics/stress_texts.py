"""Texts of known topics for the stress tests: word lists in a few sentence forms, and stories in borrowed words."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

PIECE_WORDS = 6
"""A mixed text changes its topic between pieces of so many words."""

_LISTS = """
sea        harbour tide anchor sail captain storm deck lighthouse sailor reef
cooking    oven butter recipe flour onion sauce garlic pan roast dough
astronomy  planet comet telescope orbit galaxy moon nebula star eclipse asteroid
medicine   patient surgeon fever vaccine hospital nurse symptom dose clinic diagnosis
law        judge court verdict lawyer appeal statute jury witness trial contract
football   goal striker referee penalty league coach defender stadium match keeper
music      violin orchestra melody chord rhythm singer concert symphony drum tempo
farming    wheat barn plough cattle harvest tractor orchard hay field crop
money      bank loan interest currency deposit debt credit mortgage savings account
railways   train station platform locomotive track carriage timetable signal tunnel conductor
castles    knight fortress moat tower king siege sword throne armour dungeon
chemistry  acid molecule solvent reaction catalyst compound beaker oxygen carbon crystal
software   compiler function variable server database bug code keyboard network program
gardening  tulip soil compost rose pruning seedling hedge lawn shrub watering
weather    rain cloud thunder forecast wind snow frost hail breeze temperature
volcanoes  lava eruption crater magma ash basalt caldera geyser earthquake vent
birds      feather nest sparrow eagle migration beak owl wing heron egg
fashion    dress silk designer hat fabric lace skirt collar tailor jacket
painting   canvas brush portrait pigment gallery easel landscape fresco artist colour
chess      pawn bishop rook checkmate opening gambit endgame queen board castling
aviation   pilot runway cockpit airliner propeller turbulence hangar takeoff glider altitude
desert     dune camel oasis sandstorm nomad cactus mirage drought caravan heat
cinema     director actor screenplay camera scene premiere studio trailer sequel audience
elections  ballot candidate voter parliament campaign senate coalition mandate poll minister
bees       hive honey pollen swarm nectar wax beekeeper comb drone sting
glaciers   ice crevasse moraine fjord iceberg avalanche polar meltwater arctic summit
coffee     espresso roastery bean grinder barista filter latte aroma cup crema
printing   press ink paper typeface offset proof margin newspaper publisher edition
theatre    stage curtain actress tragedy comedy rehearsal script costume applause playwright
insects    beetle ant moth larva antenna cricket wasp cocoon dragonfly locust
bridges    arch girder cable span pier viaduct toll abutment truss concrete
dentistry  tooth molar filling enamel gum cavity braces crown plaque drill
wine       vineyard grape cellar cork barrel vintage tannin bottle sommelier cask
dinosaurs  fossil jurassic skeleton reptile claw extinction jawbone herbivore predator paleontologist
boxing     punch ring glove knockout heavyweight round jab opponent champion bout
mining     coal shaft ore miner seam pit gold copper quarry pickaxe
teaching   pupil classroom lesson homework teacher exam chalk school grade curriculum
postage    letter stamp envelope postman parcel mailbox address delivery sorting postcard
dogs       puppy leash kennel bark terrier collie hound paw retriever breed
genetics   gene chromosome mutation heredity genome allele protein inheritance clone trait
clocks     watch pendulum dial minute gear hour spring escapement clockmaker chime
fishing    trout rod bait hook angler pond salmon reel carp lure
skiing     slope snowboard chairlift slalom goggles piste powder binding downhill mogul
philosophy ethics logic metaphysics virtue plato reason kant argument soul stoic
carpentry  saw plank hammer nail chisel timber joint workbench plane varnish
magnetism  magnet dipole coil compass pole iron induction current flux electron
swimming   pool stroke lane goggle butterfly freestyle diver relay breaststroke backstroke
mushrooms  spore cap truffle mycelium fungus forager chanterelle stem toadstool gill
detectives murder clue suspect alibi inspector fingerprint motive victim confession weapon
circus     clown trapeze acrobat juggler tent lion elephant tightrope ringmaster magician
"""

TOPICS: Mapping[str, tuple[str, ...]] = {
    name: tuple(words) for name, *words in (line.split() for line in _LISTS.strip().splitlines())
}
"""Fifty topics with ten words each."""

_FORMS = (
    "the {} and the {} were there before the {}",
    "we asked about the {} and about a {}",
    "nobody knew how the {} could need a {} or another {}",
    "it was a {} with its own {}",
    "after the {} came the {} and then one more {}",
    "she wrote that every {} has some {}",
)


def topic_words(topic: str, n_words: int, rng: np.random.Generator) -> list[str]:
    """So many words of running text about a topic."""
    said: list[str] = []
    while len(said) < n_words:
        form = _FORMS[rng.integers(len(_FORMS))]
        said += form.format(*rng.choice(TOPICS[topic], form.count("{}"), replace=False)).split()
    return said[:n_words]


def text_about(shares: Mapping[str, float], n_words: int, rng: np.random.Generator) -> str:
    """A text whose pieces belong to topics in the given shares, in random order; with one topic it is about that."""
    topics, weights = list(shares), np.array(list(shares.values()))
    n_pieces = max(1, n_words // PIECE_WORDS)
    bounds = np.round(np.cumsum(weights / weights.sum()) * n_pieces).astype(int)
    owners = rng.permutation(np.repeat(np.arange(len(topics)), np.diff(bounds, prepend=0)))
    pieces = [topic_words(topics[owner], PIECE_WORDS, rng) for owner in owners]
    return " ".join(word for piece in pieces for word in piece)


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A subject told plainly, the same subject told in another's words, and that other one told plainly."""

    plain: tuple[str, str]
    borrowed: str
    """About the subject of ``plain``, in words of ``lender``."""
    lender: tuple[str, str]


STORIES = (
    Story(  # cooking as war
        plain=(
            "She cut the onions, melted butter in the pan and stirred the sauce until it was thick enough for pasta.",
            "The dough rests for an hour, then it is rolled out, filled with cheese and baked in a hot oven.",
        ),
        borrowed="The kitchen is a battlefield: the chef attacks the onions, storms the oven and defends the sauce.",
        lender=(
            "The general ordered the soldiers to attack the hill, and the enemy defended the trenches until nightfall.",
            "Two regiments stormed the fortress after the artillery had broken its walls in a long battle.",
        ),
    ),
    Story(  # programs as gardens
        plain=(
            "The programmer removed the unused functions, fixed the failing tests and deployed the server again.",
            "A memory leak in the database code made the program crash, so the team rewrote the module.",
        ),
        borrowed="We prune the code like a hedge, weed out the bugs and let the program grow new branches.",
        lender=(
            "In spring she prunes the roses, weeds the flower beds and plants seedlings along the hedge.",
            "The gardener spread compost on the soil so that the shrubs would grow new branches.",
        ),
    ),
    Story(  # money as water
        plain=(
            "The bank lends its deposits to companies and charges interest on every loan and mortgage.",
            "Investors sold their shares when the company reported its losses, and the price fell.",
        ),
        borrowed="Money floods the market, deposits dry up, and the bank drowns in a wave of debt.",
        lender=(
            "After the storm the river flooded the valley and a wave broke over the banks of the canal.",
            "The stream dries up in summer, and the water of the lake falls below the level of the dam.",
        ),
    ),
    Story(  # illness as travel
        plain=(
            "The doctor examined the patient, prescribed a medicine against the fever and ordered a blood test.",
            "The nurse changed the bandage after the operation and measured the temperature every hour.",
        ),
        borrowed="Her recovery is a long road: the patient crosses a valley of fever before the journey ends.",
        lender=(
            "The travellers crossed the valley on a narrow road and reached the inn at the end of their journey.",
            "They packed a map, took the early train to the border and walked the last miles along the coast.",
        ),
    ),
    Story(  # argument as building
        plain=(
            "The lawyer argued that the witness was mistaken, and the judge asked the jury to weigh the evidence.",
            "His essay claims that the theory is wrong, gives three reasons and answers the usual objections.",
        ),
        borrowed="Her argument has a weak foundation: each claim is a brick, and the evidence does not carry the roof.",
        lender=(
            "The masons laid the foundation, set brick upon brick and put up the beams that carry the roof.",
            "Concrete was poured into the frame, and a crane lifted the steel for the upper floors of the house.",
        ),
    ),
)
