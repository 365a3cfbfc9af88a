"""What a radiograph shows, as tokens of closed lists: body region, side, view. Free text of headers goes no further.

BodyPartExamined is a defined term in the standard (PS3.16 annex L) and free text in practice: in several languages,
with sides, abbreviations and the names of protocols.
"""

import re
import unicodedata

# Token -> words. A word in lower case must stand alone, one in capitals may go on (KNIE: KNIEGELENK). The first token
# that has a word in the text wins, so what is more special stands above what is less so.
_WORDS = {
    "cspine": "hws csp CSPINE CERVICAL HALSWIRBEL DENS",
    "tspine": "bws tsp TSPINE DSPINE THORACICSPINE THORACALSPINE DORSALSPINE BRUSTWIRBEL",
    "lspine": "lws lsp LSPINE LUMBAR LUMBO LENDENWIRBEL",
    "sacrum": "SACRUM SACRAL COCCYX KREUZBEIN STEISSBEIN SSPINE isg",
    "spine": "ws SPINE WIRBEL WHOLESPINE COLUMNA RACHIS",
    "wrist": "hg WRIST HANDGELENK SCAPHOID CARPUS CARPAL HANDWURZEL POIGNET MUNECA",
    "finger": "FINGER THUMB DAUMEN DIGIT POUCE",
    "hand": "mano HAND MITTELHAND",
    "elbow": "ELBOW ELLENBOGEN ELLBOGEN COUDE codo",
    "clavicle": "acg CLAVIC KLAVIKULA SCHLUESSELBEIN ACJOINT ACGELENK",
    "scapula": "SCAPULA SKAPULA SCHULTERBLATT",
    "shoulder": "SHOULDER SCHULTER EPAULE HOMBRO",
    "humerus": "HUMERUS UPPERARM OBERARM",
    "forearm": "FOREARM UNTERARM RADIUS ULNA AVANTBRAS",
    "ankle": "osg usg ANKLE SPRUNGGELENK KNOECHEL CHEVILLE TOBILLO",
    "toe": "toe toes ZEHE GROSSZEHE HALLUX",
    "foot": "pie FOOT feet FUSS VORFUSS MITTELFUSS FERSE HEEL CALCANE KALKANE PIED",
    "knee": "KNEE KNIE PATELLA GENOU RODILLA",
    "wholeleg": "WHOLELEG LONGLEG GANZBEIN BEINACHSE",
    "lowerleg": "LOWERLEG UNTERSCHENKEL TIBIA FIBULA TIBFIB",
    "femur": "FEMUR OBERSCHENKEL THIGH UPPERLEG",
    "hip": "hip hips HUEFT HANCHE CADERA",
    "pelvis": "PELVIS BECKEN BASSIN",
    "ribs": "rib ribs RIPPE HEMITHORAX COSTA",
    "sternum": "STERNUM BRUSTBEIN",
    "chest": "lung CHEST THORAX TORAX LUNGE LUNGS",
    "abdomen": "abd kub ABDOM BAUCH",
    "breast": "BREAST MAMMA MAMMO",
    "jaw": "opg JAW TEETH TOOTH DENTAL MANDIB MAXILLA KIEFER UNTERKIEFER ZAHN PANORAMA",
    "face": "nnh FACE FACIAL NASE NASAL NOSE ORBIT SINUS JOCHBEIN ZYGOMA MITTELGESICHT",
    "skull": "SKULL SCHAEDEL HEAD KOPF CRANIUM CRANE BRAIN",
    "neck": "NECK hals",
    "extremity": "EXTREMIT arm leg bein limb",
}
REGIONS = tuple(_WORDS)
_PATTERNS = {
    token: re.compile("|".join(rf"\b{w}" if w.isupper() else rf"\b{w.upper()}\b" for w in words.split()))
    for token, words in _WORDS.items()
}
# Words that stand before "spine", "leg" and "arm" as words of their own.
_JOINED = re.compile(
    r"\b(C|T|L|D|S|AC|TIB|CERVICAL|THORACIC|DORSAL|WHOLE|LONG|LOWER|UPPER) +(SPINE|LEG|ARM|JOINT|GELENK|FIB)\b"
)

# ViewPosition: what the standard and the usual machines write -> token.
_VIEWS = {
    **{v: v for v in ("AP", "PA", "LL", "RL", "RLD", "LLD", "RLO", "LLO", "RAO", "LAO", "RPO", "LPO", "AXIAL")},
    **{v: v for v in ("MLO", "ML", "LM", "LMO", "CC", "XCCL", "XCCM", "SIO", "FB", "OBL", "MORTISE", "SKYLINE")},
    **{"LAT": "LAT", "LATERAL": "LAT", "LATERO": "LAT", "SEITLICH": "LAT", "OBLIQUE": "OBL", "AX": "AXIAL"},
    **{"SUNRISE": "SKYLINE", "TANGENTIAL": "SKYLINE", "AXIALE": "AXIAL", "YVIEW": "Y", "Y": "Y"},
}


def region(text: str) -> str:
    """One of `REGIONS`, or "" for what names none of them, e.g. "Knie li." -> "knee", "C SPINE" -> "cspine"."""
    text = text.upper().replace("Ä", "AE").replace("Ö", "OE").replace("Ü", "UE").replace("ß", "SS")
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = " ".join(re.findall("[A-Z]+", text))
    text = _JOINED.sub(r"\1\2", text)
    return next((token for token, pattern in _PATTERNS.items() if pattern.search(text)), "")


def view(text: str) -> str:
    """A view as a token such as "AP", "LAT" or "MLO", or ""."""
    return _VIEWS.get(re.sub("[^A-Z]", "", text.upper()), "")


def side(text: str) -> str:
    """ "L", "R", "B" (both) or ""."""
    text = text.strip().upper()
    return text if text in ("L", "R", "B") else ""
