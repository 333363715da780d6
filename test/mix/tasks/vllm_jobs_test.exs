defmodule Mix.Tasks.Vllm.JobsTest do
  # Mix's shell is the same for all processes, and so is the data folder.
  use ExUnit.Case, async: false

  import VLLM.FakeJobs
  import VLLM.MixShell

  alias Mix.Tasks.Vllm.{Finetune, Jobs, Quantize}
  alias Mix.Vllm.Outputs
  alias VLLM.Job
  alias VLLM.Job.Output

  @moduletag :tmp_dir
  setup [:folders, :capture_shell]

  test "what could not be compared with its source says so, and why", %{model: model} do
    # What its own measurement does.
    File.write!(Path.join(model, "model"), ~s({"measure": "refuse:unsupported_model"}))
    job = quantize!(model, [:awq], name: "llama")
    assert {:ok, [%{state: :done, notes: [note]}]} = VLLM.Job.await(job)

    assert note ==
             "The source was not measured, so that nothing can be compared with it: " <>
               "The fake job says unsupported_model."

    Jobs.run([job.id])
    assert ["llama, made of " <> _, _titles, row | notes] = lines()
    assert row =~ ~r/ not compared, perplexity 2\.5/
    assert Enum.map_join(notes, " ", &String.trim/1) == "llama:awq: " <> note
  end

  test "a model is quantized, and the job is shown, retried and deleted", %{model: model} do
    python = Keyword.fetch!(options([]), :python)
    where = ["--python", python, "--quantize-python", python]

    Quantize.run([model, "--to", "gguf:Q4,awq", "--name", "llama", "--no-verify"] ++ where)
    assert ["Job " <> id, titles, four, awq] = lines()
    assert titles =~ ~r/^output +state +size +made in +against its source$/
    assert four =~ ~r/^llama:Q4 +done +\d+ B +1 s +not compared$/
    assert awq =~ "llama:awq"

    Jobs.run([])
    assert [_titles, row] = lines()
    assert row =~ ~r/^#{id} +quantize +llama +done +2 of 2 +20\d\d-/

    Jobs.run(["--json"])
    assert printed() =~ ~s("name": "llama")

    Jobs.run([id])
    assert ["llama, made of " <> _, _titles, ^four, ^awq] = lines()

    Jobs.run(["--logs", id])
    assert "== quantize Q4" in lines()

    assert catch_exit(Jobs.run(["--retry", id])) == {:shutdown, 1}
    assert printed() =~ "nothing to retry"

    Jobs.run(["--delete", id])
    assert printed() =~ "is deleted"
    Jobs.run([])
    assert printed() =~ "There are none"
  end

  test "an estimate is a table, and no job", %{model: model} do
    python = Keyword.fetch!(options([]), :python)
    where = ["--python", python, "--quantize-python", python]
    Quantize.run([model, "--to", "gguf:Q4,awq", "--estimate"] ++ where)
    assert [titles, four, _awq, together] = lines()
    assert titles =~ ~r/^output +size +disk +memory +minutes$/
    assert four =~ ~r/^Q4 +\d+ B +\d+ B +\d+ B +1 to 2$/
    assert together =~ ~r/^together .* 2 to 4$/

    Quantize.run([model, "--to", "awq", "--estimate", "--json"] ++ where)
    assert printed() =~ ~s("outputs")
    Jobs.run([])
    assert printed() =~ "There are none"
  end

  test "an adapter is trained, with what it learned and what else is to be known", context do
    %{model: model, folder: folder} = context
    data = Path.join(folder, "data.jsonl")
    File.write!(data, "{}")
    plot = Path.join(folder, "losses.svg")
    python = Keyword.fetch!(worker(), :python)

    argv =
      [model, data, "--to", "tickets", "--python", python, "--target-modules", "q_proj,v_proj"] ++
        ["--epochs", "2", "--plot", plot]

    Finetune.run(argv ++ ["--estimate"])
    assert [_titles, foreseen, _together] = lines()
    assert foreseen =~ ~r/^adapter .* 1 to 2$/
    assert Job.list() == []

    Finetune.run(argv ++ ["--merge"])
    assert ["Job " <> id, _titles, adapter, merged, note] = lines()

    assert adapter =~
             ~r/^tickets +done .* held-out loss 0.250 \(before 7.500\), 6 of 8 other answers the same$/

    assert merged =~ "tickets-merged"
    assert note == "tickets: Something was forgotten."
    assert File.read!(plot) =~ "svg Loss of tickets"

    training = Job.get!(id).options["training"]
    assert training == %{"epochs" => 2, "merge" => true, "target_modules" => ["q_proj", "v_proj"]}

    assert_raise Mix.Error, ~r/takes a model and its data/, fn -> Finetune.run([model]) end
    late = [model, data, "--to", "tickets", "--plot"]
    assert_raise Mix.Error, ~r/--plot takes a file/, fn -> Finetune.run(late) end
  end

  test "what failed is told, with status 1", %{model: model} do
    job = quantize!(model, [a: [quantize: "refuse:unsupported"]], name: "failing", verify: false)
    {:error, _} = Job.await(job)
    Jobs.run([])
    assert printed() =~ ~r/failed +0 of 1 +The fake job says unsupported\./
    assert catch_exit(Jobs.run(["--logs", "none"])) == {:shutdown, 1}
    assert_raise Mix.Error, fn -> Jobs.run(["--cancel", job.id, "--retry", job.id]) end
    assert_raise Mix.Error, fn -> Jobs.run(["--unheard-of"]) end
  end

  test "what was lost is in a word or two" do
    quality = %{"kl_mean" => 0.0123, "same_top" => 0.97, "verdict" => "worse_than_usual"}
    output = %Output{label: "Q2_K", format: "gguf", state: :done, bytes: 1, quality: quality}
    Outputs.print([output])
    assert [_titles, row] = lines()
    assert row =~ "worse than usual, KL divergence 0.012, same top token 97.000 %"
  end
end
