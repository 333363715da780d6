defmodule VLLM.JobTest do
  use ExUnit.Case, async: false

  import VLLM.FakeJobs
  import VLLM.OSProcess

  alias VLLM.{Data, DemoModel, Error, Job, Models}
  alias VLLM.Job.{Output, Progress}

  @moduletag :tmp_dir
  setup :folders

  describe "a job" do
    test "makes its outputs one after another, verifies them, and gives them places and names",
         %{model: model} do
      job = quantize!(model, [gguf: ["Q4", "Q8"]], name: "llama")
      assert %Job{kind: :quantize, name: "llama", source: ^model, outputs: []} = job
      assert job.state in [:queued, :downloading, :preparing]

      assert {:ok, [%Output{label: "Q4"} = four, %Output{label: "Q8"}] = outputs} = Job.await(job)
      assert Enum.map(outputs, & &1.state) == [:done, :done]
      assert four.name == "llama:Q4" and four.format == "gguf"
      assert four.options == %{"word" => "Q4"}
      assert four.libraries == %{"fake" => "1.0"}
      assert four.quality["kl_mean"] == 0.25
      assert four.quality["model"] == four.name
      assert four.path == Data.model("llama", "Q4")
      assert four.bytes == File.stat!(Path.join(four.path, "model")).size

      assert {:ok, %Job{state: :done, error: nil, outputs: ^outputs} = job} = Job.get(job.id)
      assert DateTime.compare(job.ended_at, job.started_at) in [:eq, :gt]
      assert left(job) == []
      assert models() == ["llama/Q4", "llama/Q8"]

      steps = for "== " <> step <- Job.logs!(job), do: step

      assert steps ==
               ["pull", "look", "check", "names", "plan"] ++
                 ["quantize Q4", "measure_source Q4", "measure Q4", "compare Q4", "publish Q4"] ++
                 ["register Q4", "quantize Q8", "measure Q8", "compare Q8", "publish Q8"] ++
                 ["register Q8"]
    end

    @tag :slow
    @tag :slow
    test "gives no name to what says something else than its source", %{model: model} do
      to = [
        a: [verdict: "broken"],
        b: [verdict: "incomparable"],
        c: [verdict: "worse_than_usual"]
      ]

      job = quantize!(model, to, name: "llama")
      assert {:error, %Error{reason: :not_verified} = error} = Job.await(job)
      assert error.message =~ "2 of 3 outputs could not be made. a: What was made is not what"
      assert error.message =~ "It is made up."

      assert {:ok, %Job{state: :failed, outputs: [a, b, c]}} = Job.get(job)

      assert [%{reason: :not_verified}, %{reason: :not_verified}, nil] = [
               a.error,
               b.error,
               c.error
             ]

      assert c.quality["verdict"] == "worse_than_usual"
      assert models() == ["llama/c"]
      assert left(job) == []

      # It is made and looked at once more.
      assert {:error, %Error{reason: :not_verified}} = Job.await(Job.retry!(job))
    end

    test "tells how far it is, and a last time", %{model: model, folder: folder} do
      go = Path.join(folder, "go")
      job = quantize!(model, a: [as: "a", quantize: "tell:1:2;wait:#{go};tell:2:2"])
      ref = Job.subscribe!(job)
      id = job.id

      assert_receive {^ref, %Progress{state: :quantizing, done: 1, total: 2} = progress}, 60_000
      assert %{job: ^id, output: "a", output_number: 1, outputs: 1} = progress
      assert progress.figures == %{"loss" => 0.5}
      assert {:ok, %{progress: %{done: 1}}} = Job.get(job)
      assert Progress.describe(progress) == "quantizing a, layers: 1 of 2"

      File.touch!(go)
      assert {:ok, _} = Job.await(job)
      assert_received {^ref, %Progress{state: :verifying}}
      assert_receive {^ref, %Progress{state: :done, error: nil}}
      refute_received {^ref, %Progress{state: :done}}

      # Who comes late is told the end.
      late = Job.subscribe!(job)
      assert_receive {^late, %Progress{state: :done}}
    end

    test "emits events", %{model: model} do
      Application.put_env(:ex_vllm, :telemetry_listeners, [{self(), self()}])
      on_exit(fn -> Application.delete_env(:ex_vllm, :telemetry_listeners) end)
      job = quantize!(model, [a: [quantize: "tell:1:2"]], name: "told", verify: false)
      assert {:ok, [_]} = Job.await(job)
      about = %{id: job.id, kind: :quantize, name: "told", source: model}
      assert_receive {[:vllm, :job, :start], %{system_time: _}, ^about}

      assert_receive {[:vllm, :job, :progress], %{done: 1, total: 2},
                      %{output: "a", state: :quantizing}}

      assert_receive {[:vllm, :job, :stop], %{duration: _}, ^about}
      failing = quantize!(model, a: [as: "b", quantize: "refuse:unsupported"])
      assert {:error, error} = Job.await(failing)
      assert_receive {[:vllm, :job, :exception], _, %{state: :failed, error: ^error}}
    end

    test "can be waited for until a deadline, and goes on", %{model: model} do
      job = quantize!(model, a: [quantize: "wait:/nowhere"])
      assert {:error, %Error{reason: :timeout} = error} = Job.await(job, timeout: 10)
      assert error.message =~ job.id
      assert {:ok, %{state: state}} = Job.get(job)
      assert state not in [:failed, :cancelled, :done]
      cancelled = {"vllm_bridge_jobs_ended_total", "cancelled"}
      before = metrics()
      assert Job.cancel(job) == :ok
      assert metrics()[cancelled] == before[cancelled] + 1
      assert {:error, %Error{reason: :aborted}} = Job.await(job)
    end

    defp metrics do
      for {{name, %{"kind" => "quantize", "state" => state}}, value} <-
            VLLM.Prometheus.series(VLLM.Metrics.text!()),
          into: %{},
          do: {{name, state}, value}
    end

    test "that waits for others says so, and runs after them", %{model: model, folder: folder} do
      go = Path.join(folder, "go")
      first = quantize!(model, [a: [quantize: "wait:#{go}"]], name: "first", verify: false)
      second = quantize!(model, [:a], name: "second", verify: false)
      assert %{state: :queued, waiting_for: "other jobs" <> _} = Job.get!(second)
      assert [%{name: "second"}, %{name: "first"}] = Job.list()
      before = metrics()
      assert before[{"vllm_bridge_jobs", "queued"}] in [1.0, 2.0]
      File.touch!(go)
      assert {:ok, [_]} = Job.await(first)
      assert {:ok, [_]} = Job.await(second)
      now = metrics()
      assert now[{"vllm_bridge_jobs", "queued"}] == 0
      ended = {"vllm_bridge_jobs_ended_total", "done"}
      assert now[ended] == before[ended] + 2
    end

    test "waits for memory that others hold, and says so", %{model: model} do
      {_available, total} = VLLM.Job.Machine.memory()
      job = quantize!(model, a: [memory: total - 1])
      ref = Job.subscribe!(job)
      assert_receive {^ref, %Progress{state: :queued, waiting_for: "about" <> _}}, 60_000
      assert Job.cancel(job) == :ok
      assert_receive {^ref, %Progress{state: :cancelled}}
      assert left(job) == []

      never = quantize!(model, a: [memory: 2 * total])
      assert {:error, %Error{reason: :out_of_memory} = error} = Job.await(never)
      assert error.message =~ "in all"
    end

    @tag :slow
    test "waits for the memory that its measurements take, too", %{model: model} do
      {_available, total} = VLLM.Job.Machine.memory()
      source = Path.join(model, "model")
      File.write!(source, ~s({"verification": #{total - 1}}))
      job = quantize!(model, [:a], name: "waits")
      ref = Job.subscribe!(job)
      assert_receive {^ref, %Progress{state: :queued, waiting_for: "about" <> _}}, 60_000
      logs = Job.logs!(job)
      assert "== quantize a" in logs and "== measure_source a" not in logs
      assert Job.cancel(job) == :ok

      File.rm!(source)
      never = quantize!(model, [a: [verification: 2 * total]], name: "never")
      assert {:error, %Error{reason: :out_of_memory}} = Job.await(never)
      logs = Job.logs!(never)
      assert "== measure_source a" in logs and "== measure a" not in logs
    end

    test "does not take a name that is being made, nor one that is there", %{model: model} do
      job = quantize!(model, [a: [quantize: "wait:/nowhere"]], name: "taken")
      assert {:error, %Error{reason: :name_taken} = error} = quantize(model, [:b], name: "taken")
      assert error.details["job"] == job.id
      Job.cancel!(job)

      assert {:ok, [_]} = Job.await(quantize!(model, [:b], name: "taken", verify: false))
      again = quantize!(model, [:b], name: "taken", verify: false)
      assert {:error, %Error{reason: :name_taken} = error} = Job.await(again)
      assert error.message =~ "taken:b"
      refute "== plan" in Job.logs!(again)
    end

    @tag :slow
    test "does not begin where its name is an alias, or a folder's that was registered",
         context do
      %{model: model, folder: folder} = context
      :ok = Models.alias("org/name", "prod")
      Models.register!(DemoModel.path(), "mine", label: "b")
      loaded = Path.join(folder, "loaded")

      # The names are asked about by Python, and the formats are made up.
      for {source, name, to, deleted} <- [
            {model, "prod", [:a], "prod"},
            {"touch:#{loaded}@#{model}", "mine", [:a, :b], "mine:b"}
          ] do
        options = to |> options(name: name) |> Keyword.delete(:python)
        job = Job.quantize!(source, options)
        assert {:error, %Error{reason: :name_taken} = error} = Job.await(job)
        assert error.message =~ "Take another `name:`"
        assert error.message =~ "delete that one: `VLLM.Models.delete(\"#{deleted}\")`."
        refute Enum.any?(Job.logs!(job), &(&1 =~ "== quantize"))
      end

      refute File.exists?(loaded)
      job = Job.finetune!("org/name", [{"a", "b"}], to: "prod")
      assert {:error, %Error{reason: :name_taken} = error} = Job.await(job)

      assert error.message ==
               "The name `prod` is another name of `org/name` already. Give `to:` another name, or " <>
                 "delete that one: `VLLM.Models.delete(\"prod\")`."

      assert ["== names" | _] = Job.logs!(job)
    end

    test "notes the commit of a source of the hub, and of a folder what its files say", context do
      %{model: model} = context

      for {source, name, noted} <- [
            {"@#{model}", "hubs", ~r/\Aorg\/name c{40}\z/},
            {model, "ours", ~r/\A#{Regex.escape(model)} [0-9a-f]{16}\z/}
          ] do
        assert {:ok, [output]} = Job.await(quantize!(source, [:a], name: name, verify: false))
        assert File.read!(Path.join(output.path, "registered")) =~ noted
      end
    end

    test "stands back, with as many threads as it was given", %{model: model, folder: folder} do
      go = Path.join(folder, "go")
      ready = Path.join(folder, "ready")
      script = "touch:#{ready};wait:#{go}"
      job = quantize!(model, [a: [quantize: script]], verify: false, nice: 7, threads: 3)
      assert eventually(fn -> File.exists?(ready) end, 60_000)

      [worker] =
        for pid <- descendants(String.to_integer(System.pid())),
            command(pid) =~ "fake_job.py",
            do: pid

      environment = "/proc/#{worker}/environ" |> File.read!() |> String.split("\0")
      assert "OMP_NUM_THREADS=3" in environment and "EX_VLLM_NICE=7" in environment
      assert "OMP_WAIT_POLICY=passive" in environment
      File.touch!(go)
      assert {:ok, [_]} = Job.await(job)
    end
  end

  describe "what cannot be made" do
    test "is refused before a download", %{folder: folder} do
      loaded = Path.join(folder, "loaded")
      job = quantize!("touch:#{loaded}", ["unheard-of"], name: "x")
      assert {:error, %Error{reason: :invalid_option} = error} = Job.await(job)
      refute File.exists?(loaded)
      assert %{state: :failed, error: ^error, outputs: []} = Job.get!(job)
    end

    test "does not keep the others from being made, and is made by a retry", %{
      model: model,
      folder: folder
    } do
      once = "once:#{folder}/tried:refuse:unsupported"
      to = [a: [], b: [quantize: once], c: []]
      job = quantize!(model, to, name: "some", verify: false)
      assert {:error, %Error{reason: :unsupported} = error} = Job.await(job)

      assert error.message =~ "1 of 3 outputs" and
               error.details["outputs"] == %{"b" => "unsupported"}

      assert Enum.map(Job.get!(job).outputs, & &1.state) == [:done, :failed, :done]
      assert models() == ["some/a", "some/c"]

      assert {:ok, %Job{state: :queued}} = Job.retry(job)
      assert {:ok, outputs} = Job.await(job)
      assert Enum.map(outputs, & &1.name) == ["some:a", "some:b", "some:c"]
      assert Enum.count(Job.logs!(job), &(&1 == "== quantize a")) == 1
      assert {:error, %Error{reason: :unsupported}} = Job.retry(job)
    end

    test "is what does not load, or cannot be verified", %{model: model} do
      job = quantize!(model, [a: [measure: "refuse:invalid_checkpoint"]], name: "broken")
      assert {:error, %Error{reason: :invalid_checkpoint}} = Job.await(job)
      assert models() == []
      assert left(job) == []
    end

    test "is told at once where it can be" do
      for {options, text} <- [
            {[to: []], "`to:` names formats"},
            {[to: [3]], "`to` takes formats"},
            {[to: :awq, name: "../up"], "cannot be called"},
            {[to: :awq, calibration: 3], "`calibration` must be"},
            {[to: :awq, texts: []], "`texts` must be"},
            {[too: :awq], "Did you mean `to`?"},
            {[to: :awq, allowed_models: ["org/*"]], "not"}
          ] do
        assert {:error, %Error{} = error} = Job.quantize("some/model", options)
        assert error.reason in [:invalid_option, :not_allowed]
        assert error.message =~ text
      end

      assert Job.list() == []
    end
  end

  test "jobs that there are none of are told so" do
    for id <- ["20260101T000000-none", "../../etc", nil, 7] do
      assert {:error, %Error{reason: :job_not_found}} = Job.get(id)
      assert {:error, %Error{reason: :job_not_found}} = Job.cancel(id)
      assert {:error, %Error{reason: :job_not_found}} = Job.await(id)
      assert {:error, %Error{reason: :job_not_found}} = Job.logs(id)
      assert {:error, %Error{reason: :job_not_found}} = Job.retry(id)
      assert {:error, %Error{reason: :job_not_found}} = Job.delete(id)
    end
  end

  test "a job that runs is not deleted, and one that has ended is, with its outputs or without",
       %{model: model} do
    job = quantize!(model, [a: [quantize: "wait:/nowhere"]], name: "gone")
    assert {:error, %Error{reason: :job_running}} = Job.delete(job)
    assert {:error, %Error{reason: :job_running}} = Job.retry(job)
    Job.cancel!(job)
    assert Job.delete(job) == :ok
    assert {:error, %Error{reason: :job_not_found}} = Job.get(job)
    refute File.exists?(Data.jobs(job.id))
  end

  # The steps are made up, and name nothing; a model it has to be for that.
  defp named!(name) do
    place = Data.model(name, "a")
    File.cp_r!(DemoModel.path("demo-awq"), place)
    Models.register!(place, name, label: "a")
    place
  end

  defp tickets(model) do
    job = quantize!(model, [:a], name: "tickets", verify: false)
    assert {:ok, [_]} = Job.await(job)
    named!("tickets")
    job
  end

  @tag :slow
  test "the outputs of a job are deleted with it, and not those of others with their names",
       %{model: model} do
    before = tickets(model)
    Models.delete!("tickets")
    now = tickets(model)

    assert Job.delete(before, outputs: true) == :ok
    assert %{path: place} = Models.get!("tickets:a")
    assert File.exists?(place)

    # Nor while they are served.
    llm = VLLM.Test.start!(model: "tickets", script: "")
    assert {:error, %Error{reason: :in_use}} = Job.delete(now, outputs: true)
    assert File.exists?(place) and Job.get!(now).state == :done
    :ok = VLLM.stop(llm)

    # Another folder has the name.
    Models.register!(DemoModel.path(), "tickets", label: "a", replace: true)
    assert Job.delete(now, outputs: true) == :ok
    assert Models.get!("tickets:a").path == DemoModel.path()
  end

  @tag :slow
  test "an output whose folder was removed by hand loses its name with its job",
       %{model: model} do
    job = tickets(model)
    :ok = Models.alias("tickets:a", "prod")
    File.rm_rf!(Data.model("tickets", "a"))
    assert %{missing?: true} = Models.get!("tickets:a")

    assert Job.delete(job, outputs: true) == :ok

    for name <- ["tickets:a", "prod"],
        do: assert({:error, %Error{reason: :model_not_found}} = Models.get(name))
  end

  @tag :slow
  test "what a job has named, and has not noted yet, loses its name with its files",
       %{model: model, folder: folder} do
    reached = Path.join(folder, "reached")
    script = "touch:#{reached};wait:/nowhere"
    job = quantize!(model, [a: [register: script]], name: "cut-off", verify: false)
    assert eventually(fn -> File.exists?(reached) end, 60_000)
    assert Job.cancel(job) == :ok
    place = named!("cut-off")
    :ok = Models.alias("cut-off:a", "prod")

    assert Job.delete(job, outputs: true) == :ok
    refute File.exists?(place)

    for name <- ["cut-off:a", "prod"],
        do: assert({:error, %Error{reason: :model_not_found}} = Models.get(name))
  end

  test "tokens are kept in memory, and in no file", %{model: model, folder: folder} do
    job = quantize!(model, [:a], hf_token: "hf_secret", verify: false)
    assert {:ok, [_]} = Job.await(job)
    refute inspect(:sys.get_state(VLLM.Job.Queue)) =~ "hf_secret"
    refute inspect(Job.get!(job)) =~ "hf_secret"

    for file <- Path.wildcard(Path.join(folder, "data/jobs/**")),
        File.regular?(file),
        do: refute(File.read!(file) =~ "hf_secret")
  end

  test "an estimate says what each output would take, and all of them, without a job", context do
    to = [
      gguf: [bytes: 5, disk: 7, memory: 9, usual_kl: 0.03],
      awq: [bytes: 1, disk: 1, memory: 20]
    ]

    assert {:ok, %VLLM.Job.Estimate{outputs: [gguf, awq]} = estimate} =
             VLLM.Job.estimate(context.model, VLLM.FakeJobs.options(to))

    assert %{label: "gguf", bytes: 5, disk: 7, memory: 9, minutes: {1, 2}} = gguf
    assert {gguf.usual_kl, awq.usual_kl} == {0.03, nil}
    assert %{format: "awq", memory: 20} = awq
    assert {estimate.bytes, estimate.minutes} == {6, {2, 4}}
    # With the verification, which there is unless it is not wanted.
    unverified = VLLM.FakeJobs.options(to, verify: false)
    assert VLLM.Job.estimate!(context.model, unverified).minutes == {1, 2}
    assert VLLM.Job.list() == []
    assert {:error, %{reason: :invalid_option}} = VLLM.Job.estimate(context.model, to: [])
  end

  test "an estimate of a training takes what the training takes", %{model: model} do
    options = options([]) |> Keyword.delete(:to)
    options = [to: "tickets", merge: true, memory: 40] ++ options

    assert {:ok, %VLLM.Job.Estimate{outputs: [adapter, merged]} = estimate} =
             Job.estimate(model, [{"a", "b"}], options)

    assert %{label: "adapter", format: "adapter", memory: 40, minutes: {1, 2}} = adapter
    assert adapter.options == %{"merge" => true, "memory" => 40}
    assert %{label: "merged", format: "plain", options: %{}} = merged
    assert {estimate.bytes, estimate.disk} == {3, 30}
    assert Job.list() == []
    assert {:error, %{reason: :invalid_option}} = Job.estimate(model, 5, options)
  end
end
