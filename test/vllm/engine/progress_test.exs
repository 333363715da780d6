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
    assert Progress.of_wire(%{"phase" => "config"}) == %{phase: :config}

    assert Progress.describe(Progress.of_wire(%{"phase" => "hub"})) ==
             "asking the Hugging Face hub"

    assert Progress.of_wire(%{"phase" => "made_up"}) == nil
    assert Progress.of_wire(%{"phase" => 7}) == nil
    assert Progress.of_wire(%{}) == nil
  end

  test "quantizing in place is told with its figures, and at each tenth of the way" do
    of = &Progress.of_wire(%{"phase" => "quantizing", "done" => &1, "total" => 50})
    assert Progress.of_wire(%{"phase" => "quantizing"}) == %{phase: :quantizing}
    assert Progress.describe(of.(7)) == "quantizing the model (7 of 50)"
    assert Progress.describe(of.("7")) == "quantizing the model"
    assert Progress.notable?(of.(0), %{phase: :quantizing})
    assert Progress.notable?(of.(5), of.(4))
    refute Progress.notable?(of.(9), of.(5))
  end

  describe "a download" do
    defp download(bytes) do
      figures = %{"bytes" => bytes, "total_bytes" => 1_000_000, "files" => 1, "total_files" => 3}
      Progress.of_wire(Map.put(figures, "phase", "download"))
    end

    test "is told with its figures" do
      assert %{phase: :download, bytes: 250_000, total_files: 3} = progress = download(250_000)
      assert Progress.describe(progress) == "downloading 0.3 of 1.0 MB (25 %), 1 of 3 files"
    end

    test "is told without figures that make no sense" do
      assert Progress.of_wire(%{"phase" => "download"}) == %{phase: :download}
      assert Progress.of_wire(%{"phase" => "download", "bytes" => -1}) == %{phase: :download}
      assert Progress.describe(download("many")) == "downloading"
    end

    test "is worth a line in the log at each tenth of the way" do
      assert Progress.notable?(download(0), %{phase: :download})
      assert Progress.notable?(download(100_000), download(99_999))
      refute Progress.notable?(download(199_999), download(100_000))
      assert Progress.notable?(%{phase: :import}, download(199_999))
    end
  end
end
