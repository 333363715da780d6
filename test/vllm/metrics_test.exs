defmodule VLLM.MetricsTest do
  # vLLM's own metrics are those of a real engine in test/real/generate_test.exs.
  use ExUnit.Case

  import VLLM.OSProcess, only: [eventually: 2]

  alias VLLM.{Error, FakeEngine, Metrics, Prometheus}
  alias VLLM.Metrics.Exposition

  doctest VLLM.Metrics.Exposition
  doctest VLLM.Metrics.Engines, import: true

  defp series(options \\ []), do: options |> Metrics.text!() |> Prometheus.series()

  # Our own of one engine, without its name in the labels.
  defp of(series, engine) do
    for {{"vllm_bridge_" <> name, %{"engine" => ^engine} = labels}, value} <- series, into: %{} do
      {{name, Map.delete(labels, "engine")}, value}
    end
  end

  @tag :tmp_dir
  test "each replica's metrics of vLLM have the names of the engine and of the replica", %{
    tmp_dir: folder
  } do
    name = {:via, Registry, {VLLM.MetricsTest.Names, ~s(say "\\hi"\n)}}
    start_supervised!({Registry, keys: :unique, name: VLLM.MetricsTest.Names})
    VLLM.Test.start!(script: "x", name: name, model: "/secret/folder/llama", replicas: 2)
    text = Metrics.text!()
    series = Prometheus.series(text)

    for replica <- ["1", "2"] do
      labels = %{"engine" => inspect(name), "replica" => replica}
      of_vllm = Map.merge(labels, %{"exported_engine" => "0", "model_name" => "llama"})
      assert series[{"vllm:num_requests_running", of_vllm}] == 0
      assert series[{"vllm_bridge_up", labels}] == 1
    end

    assert series[{"vllm_bridge_engine_info", %{"engine" => inspect(name), "model" => "llama"}}] ==
             1

    refute text =~ "/secret"

    # And another reader finds the same, numbers that are none and what must be escaped included.
    numbers = [a: :nan, b: :infinity, c: :neg_infinity, d: 1.0e-7]
    samples = for {label, value} <- numbers, do: {"x", [{"l", "#{label}\\\n\""}], value}
    family = %{name: "x", type: "gauge", help: "One\nline \\ and more.", samples: samples}
    text = text <> Exposition.text([family])
    assert Prometheus.series(text) == Prometheus.parsed(text, folder)
    assert for({_label, value} <- numbers, do: value) -- Map.values(Prometheus.series(text)) == []
  end

  test "requests are told while they run and wait, when they are refused, and by their ends" do
    llm =
      VLLM.Test.start!(
        script: %{"hang" => :hang, "fail" => {:error, :prompt_too_long, "Too long."}, "ok" => "x"},
        name: VLLM.MetricsTest.Busy,
        max_in_flight: 1,
        max_queue: 1
      )

    VLLM.generate!(llm, ["ok", "ok"])
    {:error, _} = VLLM.generate(llm, "fail")
    for _ <- 1..2, do: FakeEngine.ask_in_background(llm, "hang")
    assert eventually(fn -> FakeEngine.in_flight(llm) == 2 end, 10_000)
    {:error, %Error{reason: :overloaded}} = VLLM.generate(llm, "ok")
    told = series() |> of("VLLM.MetricsTest.Busy")

    assert told[{"requests_running", %{"replica" => "1"}}] == 1
    assert told[{"requests_waiting", %{"replica" => "1"}}] == 1
    assert told[{"requests_limit", %{"replica" => "1"}}] == 2
    assert told[{"refused_requests_total", %{"replica" => "1"}}] == 1

    assert ends(VLLM.MetricsTest.Busy) ==
             [{"generate", "ok", 2}, {"generate", "prompt_too_long", 1}]
  end

  test "a request whose caller dies is counted as aborted, unless its caller has counted it" do
    name = VLLM.MetricsTest.Left
    llm = VLLM.Test.start!(script: %{"hang" => :hang, "ok" => "x"}, name: name)
    leaving = FakeEngine.ask_in_background(llm, "hang")
    assert eventually(fn -> FakeEngine.in_flight(llm) == 1 end, 10_000)
    Process.exit(leaving, :kill)

    for count <- 1..20 do
      {_pid, monitor} = spawn_monitor(fn -> VLLM.generate(llm, "hang", timeout: 1) end)
      assert_receive {:DOWN, ^monitor, :process, _pid, :normal}, 10_000
      assert eventually(fn -> FakeEngine.in_flight(llm) == 0 end, 10_000)
      counts = [{"generate", "aborted", 1}, {"generate", "timeout", count}]
      assert ends(name) == counts
    end
  end

  defp ends(engine) do
    for {{"requests_total", labels}, count} <- series() |> of(inspect(engine)),
        do: {labels["method"], labels["outcome"], count}
  end

  test "deaths, restarts and loads are counted, and outlive the worker" do
    llm = VLLM.Test.start!(script: %{"die" => :die, "ok" => "x"}, name: VLLM.MetricsTest.Mortal)
    before = series() |> of("VLLM.MetricsTest.Mortal")
    died = {"deaths_total", %{"replica" => "1", "reason" => "engine_dead"}}
    assert before[died] == 0
    {:error, %Error{reason: :engine_dead}} = VLLM.generate(llm, "die")
    VLLM.generate!(llm, "ok")
    now = series() |> of("VLLM.MetricsTest.Mortal")

    assert now[died] == 1
    assert now[{"restarts_total", %{"replica" => "1"}}] == 1
    assert now[{"loads_total", %{"replica" => "1", "outcome" => "ok"}}] == 2
    assert now[{"last_load_seconds", %{"replica" => "1"}}] > 0
    assert now[{"replica_state", %{"replica" => "1", "state" => "ready"}}] == 1
    assert now[{"replica_state", %{"replica" => "1", "state" => "dead"}}] == 0
  end

  test "a replica that does not answer in time is left out and said to be down, at the deadline" do
    silent = FakeEngine.start!("ready", name: VLLM.MetricsTest.Silent)
    # It stops its own process, which then answers nothing.
    FakeEngine.ask_in_background(silent, "stop")
    [{_worker, program}] = FakeEngine.workers(silent)
    stat = "/proc/#{FakeEngine.worker_pid(program)}/stat"
    assert eventually(fn -> File.read!(stat) =~ ") T " end, 10_000)
    VLLM.Test.start!(script: "x", name: VLLM.MetricsTest.Well)
    series = series(timeout: 300)

    assert of(series, "VLLM.MetricsTest.Silent")[{"up", %{"replica" => "1"}}] == 0
    assert of(series, "VLLM.MetricsTest.Well")[{"up", %{"replica" => "1"}}] == 1
    engines = for {{"vllm:" <> _, labels}, _} <- series, uniq: true, do: labels["engine"]
    assert engines == ["VLLM.MetricsTest.Well"]
  end

  test "an engine that does not load, or whose replica is drained, is told of without being waited for" do
    start_supervised!(
      FakeEngine.child_spec(name: VLLM.MetricsTest.Refused, model: "refuse:unsupported")
    )

    {:error, _} = VLLM.await_ready(VLLM.MetricsTest.Refused)
    VLLM.Test.start!(script: "x", name: VLLM.MetricsTest.Drained)
    :ok = VLLM.drain(VLLM.MetricsTest.Drained, 1)
    series = series(timeout: :infinity)

    refused = of(series, "VLLM.MetricsTest.Refused")
    assert refused[{"up", %{"replica" => "1"}}] == 0
    assert refused[{"replica_state", %{"replica" => "1", "state" => "failed"}}] == 1
    assert refused[{"loads_total", %{"replica" => "1", "outcome" => "unsupported"}}] == 1
    drained = of(series, "VLLM.MetricsTest.Drained")
    assert drained[{"replica_state", %{"replica" => "1", "state" => "drained"}}] == 1
    assert drained[{"requests_limit", %{"replica" => "1"}}] == 0
  end

  test "an option that is none is an error" do
    assert {:error, %Error{reason: :invalid_option, message: message}} = Metrics.text(timeuot: 1)
    assert message =~ "Did you mean"
  end

  describe "what is told of them:" do
    setup do
      %{own: Metrics.Families.own()}
    end

    test "the guide has each of the library's own", %{own: own} do
      guide = File.read!("guides/observability.md")
      rows = Regex.scan(~r/^\| `(vllm_bridge_\w+)` \| (\w+) \| [^|]+ \| (.*) \| (.*) \|$/m, guide)

      assert own ==
               for(
                 [_, name, type, labels, help] <- rows,
                 do: {name, type, String.split(labels, ~r/[`, ]+/, trim: true), help}
               )
    end

    test "the dashboard and the alerts ask for the library's own by their names and labels", %{
      own: own
    } do
      own = for {name, _type, labels, _help} <- own, into: %{}, do: {name, labels}
      queries = Prometheus.dashboard_queries() ++ Prometheus.alert_queries()
      names = Enum.flat_map(queries, &Prometheus.metrics/1)
      assert for("vllm_bridge_" <> _ = name <- names, not is_map_key(own, name), do: name) == []
      # All of them are shown.
      assert Map.keys(own) -- Enum.flat_map(Prometheus.dashboard_queries(), &Prometheus.metrics/1) ==
               []

      # What is neither is vLLM's: see test/real/generate_test.exs.
      assert Enum.reject(names, &(&1 =~ ~r/^(vllm_bridge_|vllm:|process_)/)) == []

      for query <- queries,
          [_, name, matchers] <- Regex.scan(~r/(vllm_bridge_\w+)\{([^}]*)\}/, query),
          [_, label] <- Regex.scan(~r/(\w+)[=!]/, matchers),
          do: assert(label in own[name], "#{name} has no label #{label}")
    end
  end
end
