// Plots as SVG, which takes its colours from the style sheet.

import type { RefObject, TargetedPointerEvent } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { UNKNOWN } from "../format";

interface Series {
  name: string;
  values: (number | null)[];
}

interface TimeChartProps {
  title: string;
  // Seconds.
  times: number[];
  series: Series[];
  show: (value: number | null) => string;
  // The top of the scale, where it is always the same one.
  top?: number;
}

const HEIGHT = 120;
const EDGE = { left: 52, right: 8, top: 8, bottom: 20 };
// The least span that is shown, in seconds.
const SPAN = 60;

// How figures have been, with the latest one beside its name, or the one that is pointed at.
export function TimeChart({ title, times, series, show, top }: TimeChartProps) {
  const [box, width] = useWidth();
  const [pointed, setPointed] = useState<number | null>(null);
  const last = times.length - 1;
  const at = pointed === null ? last : Math.min(pointed, last);

  const end = times[last] ?? 0;
  const span = Math.max(end - (times[0] ?? 0), SPAN);
  const most = top ?? ceiling(Math.max(0, ...series.flatMap((one) => one.values.map((value) => value ?? 0))));
  const x = (time: number) => EDGE.left + (1 - (end - time) / span) * (width - EDGE.left - EDGE.right);
  const y = (value: number) => EDGE.top + (1 - value / most) * (HEIGHT - EDGE.top - EDGE.bottom);

  const point = (event: TargetedPointerEvent<SVGSVGElement>) => {
    const left = event.clientX - event.currentTarget.getBoundingClientRect().left;
    const nearest = times.reduce((best, time, n) => (Math.abs(x(time) - left) < Math.abs(x(times[best]!) - left) ? n : best), 0);
    setPointed(nearest);
  };

  return (
    <figure class="chart" ref={box}>
      <figcaption>
        <span class="title">{title}</span>
        {series.map((one, n) => (
          <span class="legend" key={one.name}>
            <i class={`dot tone-${n + 1}`} />
            {series.length > 1 && <span class="muted">{one.name}</span>}
            <b>{show(one.values[at] ?? null)}</b>
          </span>
        ))}
        {pointed !== null && last >= 0 && <span class="muted">{ago(end - times[at]!)}</span>}
      </figcaption>
      <svg
        width={width}
        height={HEIGHT}
        role="img"
        aria-label={`${title} over ${ago(span)}. ${series.map((one) => summary(one, show)).join(" ")}`}
        onPointerMove={point}
        onPointerLeave={() => setPointed(null)}
      >
        {[0, most / 2, most].map((value) => (
          <g key={value}>
            <line class="grid" x1={EDGE.left} x2={width - EDGE.right} y1={y(value)} y2={y(value)} />
            <text class="tick" x={EDGE.left - 6} y={y(value) + 4} text-anchor="end">
              {show(value)}
            </text>
          </g>
        ))}
        <text class="tick" x={EDGE.left} y={HEIGHT - 4}>
          −{ago(span)}
        </text>
        <text class="tick" x={width - EDGE.right} y={HEIGHT - 4} text-anchor="end">
          now
        </text>
        {series.map((one, n) => (
          <path key={one.name} class={`line tone-${n + 1}`} d={path(times, one.values, x, y)} />
        ))}
        {pointed !== null && last >= 0 && <line class="cursor" x1={x(times[at]!)} x2={x(times[at]!)} y1={EDGE.top} y2={HEIGHT - EDGE.bottom} />}
      </svg>
    </figure>
  );
}

// A line of the last minute without axes, for a card.
export function Sparkline({ values, label }: { values: (number | null)[]; label: string }) {
  const most = Math.max(...values.map((value) => value ?? 0)) || 1;
  const times = values.map((_value, n) => n);
  const x = (n: number) => (100 * n) / Math.max(values.length - 1, 1);
  return (
    <svg class="sparkline" viewBox="0 0 100 28" preserveAspectRatio="none" role="img" aria-label={label}>
      <path class="line tone-1" vector-effect="non-scaling-stroke" d={path(times, values, x, (value) => 26 - (24 * value) / most)} />
    </svg>
  );
}

interface Axis {
  label: string;
  show: (value: number) => string;
}

interface ScatterProps {
  title: string;
  x: Axis;
  y: Axis;
  points: { name: string; x: number; y: number }[];
}

const TALL = 260;
const ROOM = { left: 64, right: 24, top: 20, bottom: 42 };

// Points with names. The vertical axis is logarithmic, since what formats lose differs by orders of magnitude.
export function Scatter({ title, x: across, y: up, points }: ScatterProps) {
  const [box, width] = useWidth();
  const right = ceiling(Math.max(...points.map((point) => point.x)));
  const low = Math.floor(Math.log10(Math.min(...points.map((point) => point.y))));
  const high = Math.max(Math.ceil(Math.log10(Math.max(...points.map((point) => point.y)))), low + 1);
  const x = (value: number) => ROOM.left + (value / right) * (width - ROOM.left - ROOM.right);
  const y = (value: number) => ROOM.top + ((high - Math.log10(value)) / (high - low)) * (TALL - ROOM.top - ROOM.bottom);
  const decades = Array.from({ length: high - low + 1 }, (_none, n) => 10 ** (low + n));

  return (
    <figure class="chart" ref={box}>
      <figcaption>
        <span class="title">{title}</span>
      </figcaption>
      <svg
        width={width}
        height={TALL}
        role="img"
        aria-label={`${title}: ${points.map((one) => `${one.name}: ${up.show(one.y)} at ${across.show(one.x)}`).join("; ")}`}
      >
        {decades.map((value) => (
          <g key={value}>
            <line class="grid" x1={ROOM.left} x2={width - ROOM.right} y1={y(value)} y2={y(value)} />
            <text class="tick" x={ROOM.left - 6} y={y(value) + 4} text-anchor="end">
              {up.show(value)}
            </text>
          </g>
        ))}
        {[0, right / 2, right].map((value) => (
          <text key={value} class="tick" x={x(value)} y={TALL - ROOM.bottom + 18} text-anchor="middle">
            {across.show(value)}
          </text>
        ))}
        <text class="tick axis" x={(ROOM.left + width - ROOM.right) / 2} y={TALL - 4} text-anchor="middle">
          {across.label}
        </text>
        <text class="tick axis" x={ROOM.left} y={12}>
          {up.label}
        </text>
        {points.map((point, n) => {
          const rightHalf = x(point.x) > width / 2;
          return (
            <g key={point.name}>
              <circle class={`point tone-${(n % 6) + 1}`} cx={x(point.x)} cy={y(point.y)} r="5" />
              <text class="name" x={x(point.x) + (rightHalf ? -9 : 9)} y={y(point.y) + 4} text-anchor={rightHalf ? "end" : "start"}>
                {point.name}
              </text>
            </g>
          );
        })}
      </svg>
    </figure>
  );
}

// A line that is broken where nothing is known.
function path(times: number[], values: (number | null)[], x: (time: number) => number, y: (value: number) => number): string {
  let pen = "M";
  let drawn = "";
  values.forEach((value, n) => {
    if (value === null) pen = "M";
    else {
      drawn += `${pen}${x(times[n]!).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = "L";
    }
  });
  return drawn;
}

// The next of 1, 2, 4, 5, 10, 20, … above.
function ceiling(value: number): number {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 10].map((step) => step * power).find((step) => step >= value)!;
}

const ago = (seconds: number): string => (seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`);

function summary({ name, values }: Series, show: (value: number | null) => string): string {
  const known = values.filter((value): value is number => value !== null);
  if (known.length === 0) return `${name}: ${UNKNOWN}.`;
  return `${name}: now ${show(values[values.length - 1]!)}, from ${show(Math.min(...known))} to ${show(Math.max(...known))}.`;
}

function useWidth(): [RefObject<HTMLElement>, number] {
  const box = useRef<HTMLElement>(null);
  const [width, setWidth] = useState(320);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.max(entry!.contentRect.width, 200)));
    observer.observe(box.current!);
    return () => observer.disconnect();
  }, []);
  return [box, width];
}
