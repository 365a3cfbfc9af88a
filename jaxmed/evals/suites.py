"""Named zero-shot suites: what is asked, how it is scored, where the data are and how their labels join (as data).

Sources: the HLIP spec, section 6 and appendix. Where a publication names no prompts, the words are ours, and the suite
says so. The names of the classes are the names of the labels in the shards; `python -m jaxmed.evaluate labels` makes a
manifest for `prep` with those names from the tables as they are published (see `label_tables`).
"""

import dataclasses
import difflib
from typing import Any

from jaxmed.core.errors import UserError

PREFIX = "This study shows: "
# The 18 templates of the newer published branch.
TEMPLATES = tuple(
    f"{PREFIX}{words}."
    for words in (
        "{}",
        *(f"{{}} {word}" for word in ("identified", "noted", "seen")),
        *(f"{word} {{}}" for word in ("new", "known", "prominent", "likely", "possibly")),
        *(f"{word} {{}}" for word in ("indicating", "reflecting", "representing", "suggesting")),
        *(f"{word} {{}}" for word in ("indicative of", "suggestive of", "related to", "consistent with")),
        "compatible with {}",
    )
)


@dataclasses.dataclass(frozen=True)
class Suite:
    """One zero-shot test.

    Attributes:
      about: one line, with the publication that the prompts come from.
      classes: {class: its prompts, complete texts}.
      negatives: the same for the absence of each class, for score "pair".
      score: see `prompts.SCORES`. "softmax": classes exclude each other; "pair": two-way softmax of a class and its
        negative; "cosine": the raw cosine, which ranks studies but has no threshold of its own.
      token: the image token that is compared (0: sentences); None: the loss of the model decides.
      merge: (label, the two classes whose scores become one, see `scores.merge_max_if_any`).
      protocol: what `--protocol=published` computes (see `published`): "searched" (metrics of each class at a threshold
        searched on the test labels), "pub_brain_5" (its three tasks), or "auc" (nothing beyond the AUC).
      data: where a user gets the studies.
      prep: the arguments of `python -m jaxmed.prep` that make the shards, "labels.csv" being the manifest that
        `python -m jaxmed.evaluate labels` writes.
      table: the published table of labels, and what it needs beside it.
    """

    name: str
    about: str
    classes: dict[str, tuple[str, ...]]
    score: str
    protocol: str
    recipe: str
    data: str
    prep: str
    table: str
    negatives: dict[str, tuple[str, ...]] | None = None
    token: int | None = None
    merge: tuple[tuple[str, tuple[str, str]], ...] = ()

    def prompts(self) -> dict[str, Any]:
        """The fields that `prompts.make` takes."""
        return {k: getattr(self, k) for k in ("classes", "negatives", "score", "token")}


def _fill(templates: tuple[str, ...], prompt: str) -> tuple[str, ...]:
    return tuple(t.replace("{}", prompt) for t in templates)


# Chest CT: class, organ of its template.

_CHEST = (
    ("Emphysema", "lung"),
    ("Atelectasis", "lung"),
    ("Lung nodule", "lung"),
    ("Lung opacity", "lung"),
    ("Pulmonary fibrotic sequela", "lung"),
    ("Pleural effusion", "lung"),
    ("Mosaic attenuation pattern", "lung"),
    ("Peribronchial thickening", "lung"),
    ("Consolidation", "lung"),
    ("Bronchiectasis", "lung"),
    ("Interlobular septal thickening", "lung"),
    ("Cardiomegaly", "heart"),
    ("Pericardial effusion", "heart"),
    ("Coronary artery wall calcification", "heart"),
    ("Hiatal hernia", "esophagus"),
    ("Arterial wall calcification", "aorta"),
)
_SHORT = {"Lung nodule": "Nodule", "Lung opacity": "Opacity"}  # where the template names the organ
_NOT = {"Atelectasis": "Not atelectatic"}
CALCIFICATION = ("Calcification", ("Coronary artery wall calcification", "Arterial wall calcification"))


def _chest(name: str, organs: bool, about: str, leave: tuple[str, ...] = (), **fields) -> Suite:
    positive, negative = {}, {}
    for finding, organ in _CHEST:
        if finding in leave:
            continue
        words = _SHORT.get(finding, finding) if organs else finding
        where = f"The {organ if organs else 'volume'} shows: "
        positive[finding] = (f"{where}{words}.",)
        negative[finding] = (f"{where}{_NOT.get(finding, 'Not ' + words[0].lower() + words[1:])}.",)
    about += f" ({'organ templates, such as The lung shows: ...' if organs else 'template The volume shows: ...'})"
    recipe = "hlip_chest_ct_published"
    return Suite(name, about, positive, "pair", "searched", recipe, negatives=negative, **fields)


_CT_RATE = dict(
    data="CT-RATE, gated, on the Hugging Face hub (ibrahimhamamci/CT-RATE): dataset/valid",
    prep="dataset/valid --manifest=labels.csv --manifest=validation_metadata.csv --study='valid_\\d+_[a-z]+_\\d+' "
    "--patient='valid_\\d+' --recipe=hlip_chest_ct_published",
    table="valid_predicted_labels.csv (VolumeName and 18 labels, of which Medical material and Lymphadenopathy are not "
    "asked about); each reconstruction is a study of its own",
)
_RAD = dict(
    merge=(CALCIFICATION,),
    data="Rad-ChestCT, 3,630 volumes, on Zenodo (record 6406114). Its .npz arrays (slices from head to foot, rows from "
    "front to back, columns from right to left, 0.8 mm each way) must become NIfTI first: "
    "nibabel.save(nibabel.Nifti1Image(numpy.load(p)['ct'].transpose(2, 1, 0), numpy.diag([-.8, -.8, -.8, 1])), out)",
    prep="rad_chest_ct_nifti --manifest=labels.csv --recipe=hlip_chest_ct_published",
    table="imgtrain_, imgvalid_ and imgtest_Abnormality_and_Location_Labels.csv (all three are test data here), with "
    "--join=CT_Scan_Metadata_Complete_35747.csv for the patients",
)

# Pub-Brain-5.

_BRAIN = {
    "normal": "No significant abnormalities",
    "stroke": "Acute stroke",
    "glioma": "Glioma",
    "meningioma": "Meningioma",
    "metastasis": "Metastasis",
}
_PUB_BRAIN = dict(
    score="softmax",
    protocol="pub_brain_5",
    recipe="hlip_brain_mri",
    data="Pub-Brain-5, 18,343 studies from five sources: OpenBHB (normal), ICPSR 38464 (stroke), BraTS 2023 (glioma, "
    "meningioma, metastasis), UCSF-BMSR and NYUMets (metastasis)",
    table="a table of yours: the columns of a prep manifest that find the study (path, bids, ...), perhaps patient, "
    "and class: normal, stroke, glioma, meningioma or metastasis",
)

# Head CT.

_RSNA = {
    "any": "intracranial hemorrhage",
    "intraparenchymal": "intraparenchymal hemorrhage",
    "intraventricular": "intraventricular hemorrhage",
    "subarachnoid": "subarachnoid hemorrhage",
    "subdural": "subdural hemorrhage",
}
_HEAD_CT = dict(score="cosine", protocol="auc", recipe="hlip_head_ct")
_RSNA_DATA = dict(
    data="RSNA Intracranial Hemorrhage Detection 2019, on Kaggle: stage_2_train (one DICOM file per slice)",
    prep="stage_2_train --manifest=labels.csv --recipe=hlip_head_ct",
    table="stage_2_train.csv (ID, Label; a row per slice and kind), with --join=FOLDER of the DICOM files, or a table "
    "of their headers with columns SOPInstanceUID, StudyInstanceUID and perhaps PatientID",
)
# The order of the last two is that of their labels: the published follow-up code had it the wrong way round.
_CQ500 = {
    "ICH": "intracranial hemorrhage",
    "IPH": "intraparenchymal hemorrhage",
    "IVH": "intraventricular hemorrhage",
    "SDH": "subdural hemorrhage",
    "EDH": "epidural hemorrhage",
    "SAH": "subarachnoid hemorrhage",
    "BleedLocation-Left": "left-sided intracranial hemorrhage",
    "BleedLocation-Right": "right-sided intracranial hemorrhage",
    "MidlineShift": "midline shift",
    "MassEffect": "mass effect",
}

# Neuroradiology: prompts equal names; * is in both lists.

_MRI = """
acute ischemic stroke*, aneurysmal subarachnoid hemorrhage*, arachnoid cyst*, arteriovenous malformation,
brain abscess, brain contusion*, brain herniation*, brain mass effect*, brain metastasis, brain midline
shift, brain tumor, brainstem glioma, catheter*, cavernous malformation cavernoma*, cavum septum pellucidum,
cephaloceles, cerebral aneurysm, cerebral atrophy*, cerebral edema*, chiari malformation*, chordoma
chondrosarcoma, chronic ischemic stroke, colloid cyst*, craniopharyngioma, craniotomy craniectomy, dandy
walker malformation*, diffuse axonal injury*, dysgenesis corpus callosum*, encephalomalacia gliosis*,
epidermoid cyst, epidural hematoma*, glioma, head neck tumor*, heterotopia, high grade glioma, hydrocephalus
ex vacuo, intracranial hemorrhage*, intracranial hypotension*, intraparenchymal hemorrhage*,
intraventricular hemorrhage*, intraventricular tumor, lacunar stroke, low grade glioma, lymphoma, mega
cisterna magna*, meningioma, moya moya disease, multiple sclerosis, nerve tumor, neuromyelitis optica,
neurosarcoidosis, obstructive hydrocephalus*, orbital tumor*, pachygyria lissencephaly, pediatric posterior
fossa tumor, pineal cyst, pineal tumor*, pituitary tumor*, pneumocephalus*, postsurgical changes*, rathkes
cleft cyst, schizencephaly, schwannoma, small vessel ischemic disease*, spinal degenerative changes*, spine
syrinx, spine tumor*, subdural hematoma, subdural hygroma effusions*, traumatic subarachnoid hemorrhage*,
tumor resection cavity, venous sinus thrombosis, ventriculomegaly*, viral encephalitis
"""
_CT_ONLY = """
acute subdural hematoma, airway obstruction, aneurysm clip, aneurysm coil, arterial dissection, basal
ganglia calcification, brain lead, burr hole, carotid cavernous fistula, cerebral abscess, cerebral
arteriovenous malformation, cerebral foreign body, cerebral subdural empyema, cerebral venous sinus
thrombosis, cholesteatoma, craniofacial injury, cranioplasty implant, craniotomy, displaced skull fracture,
embolization material, extra axial brain tumor, head neck enlarged lymph node, intra axial brain tumor,
intracranial aneurysm, intracranial atherosclerosis, intracranial epidermoid dermoid cyst, intracranial
pressure monitor, large vessel occlusion, mastoid effusion, midline shift, nondisplaced skull fracture,
orbital emphysema, orbital trauma, otitis media, parathyroid nodule, peritonsillar abscess, pharyngeal
abscess, posterior fossa tumors, resection cavity, scalp hemorrhage hematoma, sinusitis, skull base
fracture, skull bone tumor, slit ventricle, subacute chronic subdural hematoma, thyroid nodule,
transependymal flow
"""


def _names(text: str) -> list[str]:
    return [" ".join(name.split()) for name in text.split(",")]


NEURO_MRI = tuple(name.rstrip("*") for name in _names(_MRI))
NEURO_CT = tuple(sorted([name[:-1] for name in _names(_MRI) if name.endswith("*")] + _names(_CT_ONLY)))
_NEURO = dict(
    score="cosine",
    protocol="auc",
    data="your own studies; the published test sets are private. --classes=a,b chooses the names you have labels of",
    table="a manifest of yours with columns 'label:NAME'; names as listed by python -m jaxmed.evaluate suites NAME",
    token=0,
)

_ALL = (
    _chest("ct_rate", False, "16 findings of chest CT, HLIP on CT-RATE", **_CT_RATE),
    _chest("ct_rate_organ", True, "16 findings of chest CT, HLIP on CT-RATE", **_CT_RATE),
    _chest("rad_chest_ct", False, "14 findings, HLIP on Rad-ChestCT", ("Mosaic attenuation pattern",), **_RAD),
    _chest("rad_chest_ct_organ", True, "14 findings, HLIP on Rad-ChestCT", ("Mosaic attenuation pattern",), **_RAD),
    Suite(
        "pub_brain_5",
        "normal or one of four diseases in brain MRI, HLIP as first published (one template, 144 slices)",
        {k: _fill(("This MRI study shows: {}.",), v) for k, v in _BRAIN.items()},
        prep="FOLDERS --manifest=labels.csv --recipe=hlip_brain_mri --recipe.slices=144",
        **_PUB_BRAIN,
    ),
    Suite(
        "pub_brain_5_templates",
        "the same, HLIP's newer branch (18 templates, but one for normal; sentence token; 48 slices)",
        {k: _fill(TEMPLATES[:1] if k == "normal" else TEMPLATES, v.lower()) for k, v in _BRAIN.items()},
        token=0,
        prep="FOLDERS --manifest=labels.csv --recipe=hlip_brain_mri",
        **_PUB_BRAIN,
    ),
    Suite(
        "rsna",
        "five labels of hemorrhage in head CT, HLIP as first published (one template)",
        {k: _fill(("This CT study shows: {}.",), v) for k, v in _RSNA.items()},
        **_HEAD_CT,
        **_RSNA_DATA,
    ),
    Suite(
        "rsna_templates",
        "the same, HLIP's newer branch (18 templates, sentence token)",
        {k: _fill(TEMPLATES, v) for k, v in _RSNA.items()},
        token=0,
        **_HEAD_CT,
        **_RSNA_DATA,
    ),
    Suite(
        "cq500",
        "ten targets in head CT by the majority of three readers (18 templates, sentence token; some words are ours)",
        {k: _fill(TEMPLATES, v) for k, v in _CQ500.items()},
        token=0,
        data="CQ500, 491 studies, from qure.ai (headctstudy.qure.ai/dataset)",
        prep="CQ500 --manifest=labels.csv --recipe=hlip_head_ct",
        table="reads.csv (R1:ICH ... R3:MidlineShift); CQ500-CT-163 is left out, as in the publications",
        **_HEAD_CT,
    ),
    Suite(
        "neuro_mri",
        "74 findings of neuroradiology in MRI (18 templates, sentence token)",
        {name: _fill(TEMPLATES, name) for name in NEURO_MRI},
        recipe="hlip_brain_mri",
        prep="FOLDERS --manifest=YOURS.csv --recipe=hlip_brain_mri",
        **_NEURO,
    ),
    Suite(
        "neuro_ct",
        "82 findings of neuroradiology in head CT (18 templates, sentence token)",
        {name: _fill(TEMPLATES, name) for name in NEURO_CT},
        recipe="hlip_head_ct",
        prep="FOLDERS --manifest=YOURS.csv --recipe=hlip_head_ct",
        **_NEURO,
    ),
)
SUITES = {suite.name: suite for suite in _ALL}


def get(name: str) -> Suite:
    """The suite of that name.

    Raises:
      UserError: there is none; names those that exist.
    """
    if name not in SUITES:
        close = difflib.get_close_matches(str(name), SUITES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"there is no suite {name!r}; {hint}they are {', '.join(SUITES)}")
    return SUITES[name]
