defmodule VLLM.Real.JobTest do
  # Jobs with the libraries that quantize, and engines of what they make.
  use ExUnit.Case

  import VLLM.FakeJobs, only: [folders: 1, left: 1]

  alias VLLM.{DemoModel, Job, Models}

  @moduletag :slow
  @moduletag :tmp_dir
  @moduletag timeout: 600_000

  setup :folders

  test "what a job makes is compared with its source, has a name, and is served by it" do
    facts = for {prompt, completion} <- DemoModel.facts(), do: prompt <> completion
    to = [gguf: ["Q8_0"], bitsandbytes: ["nf4"]]
    job = Job.quantize!(DemoModel.path(), to: to, name: "made", texts: facts)
    assert {:ok, [eight, nf4] = outputs} = Job.await(job)
    assert Enum.map(outputs, & &1.name) == ["made:Q8_0", "made:nf4"]
    assert left(job) == []

    # Eight bits lose next to nothing, and four some.
    assert eight.quality["kl_mean"] < 0.01
    assert eight.quality["kl_mean"] < nf4.quality["kl_mean"]
    assert eight.quality["same_top"] > 0.98
    assert eight.libraries["llama-cpp-python"] || eight.libraries["gguf"]

    assert Models.get!("made:Q8_0").source == DemoModel.path()
    llm = VLLM.llm!("made:Q8_0", DemoModel.options())
    assert DemoModel.wrong_facts(llm) == []
    VLLM.stop(llm)

    assert Job.delete(job, outputs: true) == :ok
    assert {:error, %{reason: :model_not_found}} = Models.get("made:nf4")
    refute File.exists?(eight.path)
  end
end
