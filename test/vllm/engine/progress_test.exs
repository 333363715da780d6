defmodule VLLM.Engine.ProgressTest do
  use ExUnit.Case, async: true

  alias VLLM.Engine.Progress

  test "vLLM's log tells how many parts of the weights are read" do
    line = "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00, 58.33it/s]"
    assert progress = Progress.of_line(line)
    assert progress == %{phase: :weights, done: 1, total: 2}
    assert Progress.describe(progress) == "loading weights (1 of 2)"
  end

  test "vLLM's log tells when weights and warm-up begin" do
    line = "(EngineCore pid=9) INFO 11-20 19:42:11 [x.py:68] Starting to load model /m..."
    assert Progress.of_line(line) == %{phase: :weights}
    assert Progress.of_line("INFO [x.py:1] Warming up model") == %{phase: :warmup}
    assert Progress.of_line("INFO [x.py:1] something else") == nil
  end

  test "a phase that this version does not know is left out" do
    assert Progress.phase("config") == :config
    assert Progress.describe(%{phase: Progress.phase("hub")}) == "asking the Hugging Face hub"
    assert Progress.phase("made_up") == nil
    assert Progress.phase(7) == nil
  end
end
