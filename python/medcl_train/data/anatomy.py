"""Shapes and contrast of the cardiac phantom: one short-axis slice at a time, lengths in mm.

A slice looks as in a cine (balanced SSFP) image: bright blood, dark myocardium, bright fat, dark
lung. The left ventricle is a ring (2) around a disc (3), the right ventricle a crescent (1) on its
left; radii follow the taper from base to apex and the contraction from ED to ES. Edges are
anti-aliased in the image (partial volume); a label belongs to the side of the boundary where the
pixel's centre lies.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

RV, MYOCARDIUM, LV = 1, 2, 3
# group: LV cavity radius and wall at the base in ED (mm), radius left at ES, size of the RV.
GROUPS = {
    "NOR": (24.0, 9.0, 0.70, 1.0),
    "MINF": (26.0, 8.5, 0.82, 1.0),
    "DCM": (31.0, 7.5, 0.88, 1.0),
    "HCM": (21.0, 14.0, 0.60, 0.95),
    "RV": (23.0, 9.0, 0.74, 1.3),
}
BLOOD, LUNG, MUSCLE, AIR = 1.0, 0.07, 0.36, 0.01


@dataclass(frozen=True)
class Heart:
    """One patient's heart; drawn once, used for all phases and slices."""

    group: str
    radius: float  # LV cavity at the base in ED
    wall: float
    residual: float  # ES / ED cavity radius
    rv_scale: float
    septum: float  # direction from LV to RV, radians
    harmonics: tuple  # (order, amplitude, phase) of the LV outline
    infarct: float  # direction of the segment that does not contract (MINF)
    papillary: tuple  # two directions

    @classmethod
    def draw(cls, group: str, random: np.random.RandomState) -> "Heart":
        radius, wall, residual, rv_scale = GROUPS[group]
        return cls(
            group=group,
            radius=radius + random.uniform(-1.5, 1.5),
            wall=wall + random.uniform(-0.7, 0.7),
            residual=residual + random.uniform(-0.03, 0.03),
            rv_scale=rv_scale * random.uniform(0.95, 1.05),
            septum=np.pi + random.uniform(0.0, 0.5),
            harmonics=tuple(
                (k, random.uniform(0.0, 0.035), random.uniform(0, 2 * np.pi)) for k in (2, 3, 4)
            ),
            infarct=random.uniform(0, 2 * np.pi),
            papillary=tuple(np.array([0.7, 2.2]) + random.uniform(-0.2, 0.2, 2)),
        )

    def outlines(self, x, y, depth: float, contraction: float):
        """Signed distances (mm, negative inside) of LV cavity, epicardium and RV.

        Args:
            x, y: mm from the LV centre. depth: 0 base .. 1 apex. contraction: 0 ED .. 1 ES.
        """
        distance, angle = np.hypot(x, y), np.arctan2(y, x)
        wave = sum(a * np.cos(k * angle + phase) for k, a, phase in self.harmonics)
        still = np.zeros_like(distance)
        if self.group == "MINF":
            still = np.exp(2.5 * (np.cos(angle - self.infarct) - 1))
        moved = contraction * (1 - 0.8 * still)
        taper = np.sqrt(1 - min(0.93 * depth * (1 + 0.04 * contraction), 0.97) ** 2)
        cavity = self.radius * taper * (1 - (1 - self.residual) * moved) * (1 + wave)
        cavity = np.maximum(cavity, 4.5 - 1.5 * contraction)
        wall = self.wall * (0.75 + 0.25 * taper) * (1 + 0.35 * moved) * (1 - 0.25 * still)
        lv = distance - cavity
        epicardium = distance - cavity - wall
        rv = np.full_like(distance, 1e3)
        if depth < 0.8:
            rv_taper = np.sqrt(1 - (depth / 0.85) ** 2) * self.rv_scale
            along = 30.0 * rv_taper * (1 - 0.27 * contraction)
            across = 36.0 * rv_taper * (1 - 0.12 * contraction)
            outer = float(np.mean(cavity + wall))
            u = x * np.cos(self.septum) + y * np.sin(self.septum) - 0.72 * outer
            v = -x * np.sin(self.septum) + y * np.cos(self.septum)
            rv = (np.hypot(u / along, v / across) - 1) * np.sqrt(along * across)
        return lv, epicardium, rv


@dataclass(frozen=True)
class Scene:
    """What surrounds the heart and how it is imaged, constant in one patient."""

    heart: Heart
    centre: tuple[float, float]  # LV centre, mm from the middle of the slice
    torso: tuple[float, float]  # half axes
    rotation: float  # of the whole scene in the slice, radians
    wall: float  # signal of myocardium, fat and liver relative to blood
    fat: float
    liver: float
    bias: tuple  # coefficients of the log bias field
    noise: float
    blur: float  # pixels
    intensity: float

    @classmethod
    def draw(cls, heart: Heart, random: np.random.RandomState) -> "Scene":
        return cls(
            heart=heart,
            centre=(12 + random.uniform(-5, 5), random.uniform(-6, 6)),
            torso=(random.uniform(165, 185), random.uniform(112, 128)),
            rotation=random.uniform(-0.35, 0.35),
            wall=random.uniform(0.27, 0.38),
            fat=random.uniform(0.7, 0.95),
            liver=random.uniform(0.4, 0.55),
            bias=tuple(
                random.uniform(-1, 1, 5) * (0.35, 0.2, 0.15, 0.15, 0.15) - (0, 0.35, 0, 0, 0)
            ),
            noise=random.uniform(0.018, 0.035),
            blur=random.uniform(0.45, 0.65),
            intensity=random.uniform(250, 1400),
        )

    def slice(self, shape, spacing, depth, contraction, shift, random):
        """(image (X, Y) float64 >= 0, label (X, Y) uint8) of one slice.

        Args:
            shape, spacing: pixels and mm along X, Y. depth: 0 base .. 1 apex, > 1 below the heart.
            shift: mm, breathing displacement of this slice.
        """
        axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
        flat_x, flat_y = np.meshgrid(*axes, indexing="ij")
        cosine, sine = np.cos(self.rotation), np.sin(self.rotation)
        x, y = cosine * flat_x + sine * flat_y, cosine * flat_y - sine * flat_x
        pixel = float(np.mean(spacing))
        image = np.full(shape, AIR)

        def paint(outside, value):  # outside: signed distance, mm
            cover = np.clip(0.5 - outside / pixel, 0, 1)
            np.add(image * (1 - cover), cover * value, out=image)

        def ellipse(cx, cy, a, b):
            return (np.hypot((x - cx) / a, (y - cy) / b) - 1) * min(a, b)

        a, b = self.torso
        paint(ellipse(0, 10, a, b), self.fat)
        paint(ellipse(0, 10, a - 16, b - 13), MUSCLE)
        paint(ellipse(0, 10, a - 26, b - 22), LUNG)
        hx, hy = self.centre[0] + shift[0], self.centre[1] + shift[1]
        paint(ellipse(-70, 60, 60 + 30 * depth, 45 + 25 * depth), self.liver)
        paint(ellipse(62, 74, 32 + 14 * depth, 26 + 10 * depth), self.liver * 1.15)
        paint(ellipse(0, 98, 26, 24), MUSCLE * 1.1)  # vertebra
        paint(ellipse(30, 72, 12, 12), BLOOD * 0.95)  # descending aorta
        paint(ellipse(hx - 14, hy, 66 - 12 * depth, 52 - 10 * depth), self.fat * 0.7)
        label = np.zeros(shape, dtype=np.uint8)
        inflow = random.uniform(0.92, 1.05)
        if depth <= 1:
            self._paint_heart(paint, label, x - hx, y - hy, depth, contraction, inflow)
        texture = ndimage.gaussian_filter(random.standard_normal(shape), 3.0 / pixel)
        image *= 1 + 0.05 * texture / texture.std()
        image = ndimage.gaussian_filter(image, self.blur)
        bx, by = flat_x / 150, flat_y / 150  # the coils stay with the scanner
        terms = (bx, by, bx * by, bx**2, by**2)
        image *= np.exp(sum(c * t for c, t in zip(self.bias, terms, strict=True)))
        real, imaginary = random.standard_normal((2, *shape)) * self.noise  # Rician, as magnitude
        return np.hypot(image + real, imaginary) * self.intensity, label

    def _paint_heart(self, paint, label, x, y, depth, contraction, inflow):
        heart = self.heart
        lv, epicardium, rv = heart.outlines(x, y, depth, contraction)
        paint(rv - 3.0, self.wall * 1.1)  # the RV's thin wall, which nobody labels
        paint(rv, BLOOD * 0.93 * inflow)
        paint(epicardium, self.wall)
        paint(lv, BLOOD * inflow)
        if 0.15 < depth < 0.8:
            inner = heart.radius * np.sqrt(1 - (0.93 * depth) ** 2)
            inner *= 1 - (1 - heart.residual) * contraction
            for angle in heart.papillary:  # inside the cavity's label, as in ACDC
                px, py = 0.66 * inner * np.cos(angle), 0.66 * inner * np.sin(angle)
                paint(np.hypot(x - px, y - py) - 0.17 * inner, self.wall * 1.25)
        label[rv < 0] = RV
        label[epicardium < 0] = MYOCARDIUM
        label[lv < 0] = LV
