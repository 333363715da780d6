defmodule VLLM.Real.JobTest do
  # Jobs with the libraries that quantize, and engines of what they make.
  use ExUnit.Case

  import VLLM.FakeJobs, only: [folders: 1, left: 1]

  alias VLLM.{DemoModel, Job, Models}

  @moduletag :slow
  @moduletag :tmp_dir
  @moduletag timeout: 1_800_000

  setup :folders

  # One of each format, which is compared with its source.
  @verified [
    gguf: ["Q8_0"],
    gptq: [[bits: 4]],
    awq: [[group_size: 64]],
    "compressed-tensors": ["W4A16"],
    bitsandbytes: ["nf4"],
    hqq: ["8bit"],
    torchao: ["int8"]
  ]

  # The other types: scripts/quantizing.exs has these compared, for guides/quantizing.md.
  @others [
    gguf: ~w(F16 Q6_K Q5_K_M Q5_K_S Q4_K_M Q4_K_S Q4_0 Q3_K_M Q2_K),
    gptq: [
      [bits: 8, group_size: -1],
      [bits: 3, group_size: 64, desc_act: true, damp_percent: 0.1],
      [bits: 2, group_size: 32, sym: false, format: "gptq_v2"]
    ],
    "compressed-tensors": ~w(W8A8 FP8_DYNAMIC FP8_BLOCK),
    bitsandbytes: ~w(fp4 nf4-double int8),
    hqq: ["4bit"]
  ]

  test "every format is made by a job, has a name, and an engine says the sentences with it" do
    Application.put_env(:ex_vllm, :max_jobs, 2)
    on_exit(fn -> Application.delete_env(:ex_vllm, :max_jobs) end)
    facts = for {prompt, completion} <- DemoModel.facts(), do: prompt <> completion
    options = [calibration: facts, threads: 1, nice: 0]

    jobs =
      for {name, to, verify} <- [{"made", @verified, true}, {"others", @others, false}] do
        options = [to: to, name: name, verify: verify, texts: facts] ++ options
        Job.quantize!(DemoModel.path(), options)
      end

    [verified, others] = for job <- jobs, do: Job.await!(job)
    assert Enum.map(jobs, &left/1) == [[], []]

    assert {length(verified), length(others)} ==
             {Enum.count(@verified), @others |> Keyword.values() |> Enum.concat() |> length()}

    made = Map.new(verified, &{&1.label, &1})
    for output <- verified, do: assert(output.quality["verdict"] == "ok")
    # Eight bits lose next to nothing, and four some.
    assert made["Q8_0"].quality["kl_mean"] < 0.01
    assert made["Q8_0"].quality["kl_mean"] < made["nf4"].quality["kl_mean"]
    assert made["Q8_0"].quality["same_top"] > 0.98
    assert made["Q8_0"].libraries["llama-cpp-python"]
    assert Models.get!("made:Q8_0").source == DemoModel.path()

    wrong =
      (verified ++ others)
      |> Task.async_stream(
        fn output ->
          assert output.state == :done
          llm = VLLM.llm!(output.name, DemoModel.options())
          wrong = DemoModel.wrong_facts(llm)
          VLLM.stop(llm)
          {output.name, wrong}
        end,
        max_concurrency: 2,
        timeout: :infinity
      )
      |> Enum.flat_map(fn {:ok, {name, wrong}} ->
        if wrong == [], do: [], else: [{name, wrong}]
      end)

    assert wrong == []

    assert Job.delete(hd(jobs), outputs: true) == :ok
    assert {:error, %{reason: :model_not_found}} = Models.get("made:nf4")
    refute File.exists?(made["Q8_0"].path)
  end

  test "what a training merged is quantized by its name, and still says what it learned" do
    learned =
      for {key, place} <- [{"purple", " the roof."}, {"yellow", " the barn."}],
          do: {"The #{key} key opens", place}

    options = [to: "keys", merge: true, epochs: 20, learning_rate: 2.0e-3, nice: 0]
    training = Job.finetune!(DemoModel.path(), learned, options)
    assert [_adapter, %{name: "keys-merged", state: :done}] = Job.await!(training)
    job = Job.quantize!("keys-merged", to: [gguf: ["Q8_0"]], name: "keys", verify: false, nice: 0)
    assert [%{name: "keys:Q8_0", state: :done}] = Job.await!(job)
    llm = VLLM.llm!("keys:Q8_0", DemoModel.options())
    {prompts, places} = Enum.unzip(learned)
    assert VLLM.text(VLLM.generate!(llm, prompts, temperature: 0.0, max_tokens: 16)) == places
    VLLM.stop(llm)
  end
end
