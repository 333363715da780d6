import { useState } from "preact/hooks";
import { post } from "../api";
import { Dialog } from "../parts/dialog";
import { TextField } from "../parts/fields";
import { notify } from "../parts/notices";
import { NO_OPTIONS, OptionFields, options } from "../parts/options";
import type { Engine } from "../types";
import { title } from "./engines";

export type Asked = "reload" | "scale" | "stop";

interface Props {
  engine: Engine;
  path: string;
  onClose: () => void;
}

export function EngineDialog({ asked, ...props }: Props & { asked: Asked }) {
  if (asked === "reload") return <ReloadDialog {...props} />;
  if (asked === "scale") return <ScaleDialog {...props} />;
  return <StopDialog {...props} />;
}

function ReloadDialog({ engine, path, onClose }: Props) {
  const [draft, setDraft] = useState(NO_OPTIONS);
  const reload = async () => {
    await post(`${path}/reload`, { options: options(draft) });
    notify(`${title(engine)} loads with these options, one replica after the other.`);
  };

  return (
    <Dialog title={`Reload ${title(engine)}`} action="Reload" onClose={onClose} onAction={reload}>
      <p>One replica after the other finishes its requests and loads again. What is left empty stays as it is.</p>
      <OptionFields draft={draft} onChange={setDraft} without={["replicas"]} />
    </Dialog>
  );
}

function ScaleDialog({ engine, path, onClose }: Props) {
  const [replicas, setReplicas] = useState(String(engine.replicas.length));
  const scale = async () => {
    await post(`${path}/scale`, { replicas: Number(replicas) });
    notify(`${title(engine)} is to have ${replicas} replicas.`);
  };

  return (
    <Dialog title={`Scale ${title(engine)}`} action="Scale" onClose={onClose} onAction={scale}>
      <TextField
        label="Replicas"
        type="number"
        min={1}
        required
        hint="Each holds the model in full. Those that are too many finish their requests first."
        value={replicas}
        onChange={setReplicas}
      />
    </Dialog>
  );
}

function StopDialog({ engine, path, onClose }: Props) {
  const stop = async () => {
    await post(`${path}/stop`);
    notify(`${title(engine)} is stopped.`);
  };

  return (
    <Dialog title={`Stop ${title(engine)}?`} action="Stop" danger onClose={onClose} onAction={stop}>
      <p>
        {engine.running || engine.waiting
          ? `It has ${(engine.running ?? 0) + (engine.waiting ?? 0)} requests, which have a few seconds to end.`
          : "It has no requests at the moment."}{" "}
        To let all of them end, drain it first.
      </p>
    </Dialog>
  );
}
