import { useState } from "preact/hooks";
import { post } from "../api";
import { Dialog } from "../parts/dialog";
import { TextField } from "../parts/fields";
import { NO_OPTIONS, OptionFields, options } from "../parts/options";
import { go } from "../route";
import type { Engine } from "../types";
import { useModels } from "../use-models";

export function StartDialog({ model: given = "", onClose }: { model?: string; onClose: () => void }) {
  const [model, setModel] = useState(given);
  const [name, setName] = useState("");
  const [draft, setDraft] = useState(NO_OPTIONS);
  const { models } = useModels();

  const start = async () => {
    const body = { model: model.trim(), name: name.trim() || undefined, options: options(draft) };
    const { engine } = await post<{ engine: Engine }>("api/v1/engines", body);
    go("engines", engine.id);
  };

  return (
    <Dialog title="Start an engine" action="Start" onClose={onClose} onAction={start}>
      <TextField
        label="Model"
        required
        hint="A folder, a GGUF file, a name of the hub (org/name, org/name-GGUF:Q8_0), or one of this machine."
        list={models?.filter((one) => one.kind === "model").map((one) => one.name)}
        value={model}
        onChange={setModel}
      />
      <TextField label="Name" placeholder="none" hint="What programs and this page call it." value={name} onChange={setName} />
      <OptionFields draft={draft} onChange={setDraft} />
    </Dialog>
  );
}
