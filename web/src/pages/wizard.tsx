import { useEffect, useRef, useState } from "preact/hooks";
import { get, message, post } from "../api";
import { short } from "../format";
import { attempt, notify } from "../parts/notices";
import { value } from "../parts/options";
import { go, link } from "../route";
import type { Format, Job, OutputEstimate, Sizes, Wanted } from "../types";
import { FormatsStep, ReviewStep, SourceStep, TypesStep } from "./wizard-steps";

export interface Plan {
  model: string;
  name: string;
  // The formats that are to be made, with their types and with options as texts.
  chosen: Record<string, { types: string[]; options: Record<string, string> }>;
  verify: boolean;
  calibration: string;
}

export interface Estimates {
  each: OutputEstimate[];
  together: Sizes | null;
  refused: string | null;
  busy: boolean;
}

const STEPS = ["Source", "Formats", "Types and options", "Review"];
const NOTHING: Estimates = { each: [], together: null, refused: null, busy: false };
// How long somebody may go on choosing before it is estimated, in ms.
const PAUSE = 400;

// Four steps to a job that makes a model in other formats.
export function WizardPage() {
  const [step, setStep] = useState(0);
  const [formats, setFormats] = useState<Format[] | null>(null);
  const [refused, setRefused] = useState<string | null>(null);
  const [plan, setPlan] = useState<Plan>({ model: "", name: "", chosen: {}, verify: true, calibration: "" });
  const [busy, setBusy] = useState(false);
  const outputs = wanted(plan, formats ?? []);
  const estimates = useEstimates(plan.model.trim(), outputs, step >= 2);
  const heading = useRef<HTMLHeadingElement>(null);
  const moved = useRef(false);

  useEffect(() => {
    get<{ formats: Format[] }>("api/v1/quantize/options").then(
      (answer) => setFormats(answer.formats),
      (error) => setRefused(message(error)),
    );
  }, []);

  useEffect(() => {
    if (moved.current) heading.current!.focus();
    moved.current = true;
  }, [step]);

  const change = (by: Partial<Plan>) => setPlan({ ...plan, ...by });
  const may = [plan.model.trim() !== "", Object.keys(plan.chosen).length > 0, outputs.length > 0 && !estimates.refused, !busy][step];

  const submit = async (event: Event) => {
    event.preventDefault();
    if (step < STEPS.length - 1) {
      setStep(step + 1);
      return;
    }
    setBusy(true);
    await attempt(start(plan, outputs));
    setBusy(false);
  };

  return (
    <>
      <h1 tabIndex={-1}>New quantization job</h1>
      <ol class="steps" aria-label="Steps">
        {STEPS.map((name, n) => (
          <li key={name} class={n < step ? "past" : ""} aria-current={n === step ? "step" : undefined}>
            {name}
          </li>
        ))}
      </ol>
      {refused && <p class="note bad">{refused}</p>}
      <form class="card fields wizard" onSubmit={submit}>
        <h2 ref={heading} tabIndex={-1}>
          {STEPS[step]}
        </h2>
        {step === 0 && <SourceStep plan={plan} onChange={change} />}
        {step === 1 && <FormatsStep plan={plan} formats={formats} onChange={change} />}
        {step === 2 && <TypesStep plan={plan} formats={formats ?? []} estimates={estimates} onChange={change} />}
        {step === 3 && <ReviewStep plan={plan} estimates={estimates} onChange={change} />}
        <div class="actions end">
          {step === 0 ? (
            <a class="button" href={link("quantize")}>
              Cancel
            </a>
          ) : (
            <button type="button" onClick={() => setStep(step - 1)}>
              Back
            </button>
          )}
          <button type="submit" class="primary" disabled={!may}>
            {step === STEPS.length - 1 ? "Start the job" : "Next"}
          </button>
        </div>
      </form>
    </>
  );
}

async function start(plan: Plan, to: Wanted[]): Promise<void> {
  const name = plan.name.trim() || suggestion(plan.model);
  const options = { verify: plan.verify, ...(plan.calibration.trim() && { calibration: plan.calibration.trim() }) };
  await post<{ job: Job }>("api/v1/quantize/jobs", { model: plan.model.trim(), name, to, options });
  notify(`The job ${name} is under way.`);
  go("quantize");
}

// The last part of the model's name, in the letters that names of models may have.
export const suggestion = (model: string): string => short(model.trim()).replace(/[^\w.-]+/g, "-");

// An output for each type that was chosen of a format, or one of a format that has no types.
function wanted(plan: Plan, formats: Format[]): Wanted[] {
  return formats.flatMap(({ format, types }) => {
    const chosen = plan.chosen[format];
    if (!chosen) return [];
    const given = Object.entries(chosen.options).filter(([, text]) => text !== "");
    const options = given.length > 0 ? { options: Object.fromEntries(given.map(([name, text]) => [name, value(text)])) } : {};
    if (types.length === 0) return [{ format, ...options }];
    return types.filter((type) => chosen.types.includes(type)).map((type) => ({ format, type, ...options }));
  });
}

// What the outputs would take, asked for a moment after the last change.
function useEstimates(model: string, to: Wanted[], on: boolean): Estimates {
  const [estimates, setEstimates] = useState(NOTHING);
  const asked = JSON.stringify(to);

  useEffect(() => {
    if (!on || to.length === 0) {
      setEstimates(NOTHING);
      return undefined;
    }
    const stop = new AbortController();
    const ask = async () => {
      try {
        const answer = await post<{ estimates: OutputEstimate[]; together: Sizes }>("api/v1/quantize/estimate", { model, to }, stop.signal);
        setEstimates({ each: answer.estimates, together: answer.together, refused: null, busy: false });
      } catch (error) {
        if (!stop.signal.aborted) setEstimates({ ...NOTHING, refused: message(error) });
      }
    };
    setEstimates((last) => ({ ...last, busy: true }));
    const timer = setTimeout(ask, PAUSE);
    return () => {
      clearTimeout(timer);
      stop.abort();
    };
  }, [model, asked, on]);

  return estimates;
}
