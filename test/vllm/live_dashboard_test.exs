# What VLLM.LiveDashboard uses of Phoenix LiveDashboard, in a few lines: the package is not here.
defmodule Phoenix.LiveDashboard.PageBuilder do
  @callback init(term()) :: {:ok, map(), keyword()}
  @callback menu_link(map(), map()) :: {:ok, String.t()} | :skip
  @callback render(map()) :: term()

  defmacro __using__(_options) do
    quote do
      @behaviour Phoenix.LiveDashboard.PageBuilder
      import VLLM.HEEx
    end
  end
end

Code.compile_file(Path.expand("../../lib/vllm/live_dashboard.ex", __DIR__))

defmodule VLLM.LiveDashboardTest do
  # Not async: it shows the engines of other tests, too.
  use ExUnit.Case

  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.{FakeEngine, LiveDashboard}

  @params %{search: nil, sort_by: :engine, sort_dir: :asc, limit: 50}

  defp rows(params), do: LiveDashboard.rows(Map.merge(@params, params), node())

  test "each replica is a row, with the figures of its columns" do
    script = %{"hang" => :hang, "die" => :die, "ok" => "x"}
    names = [VLLM.LiveDashboardTest.A, VLLM.LiveDashboardTest.B]

    [a, _b] =
      for name <- names,
          do:
            VLLM.Test.start!(name: name, script: script, model: "/secret/llama", max_in_flight: 1)

    {:error, %{reason: :engine_dead}} = VLLM.generate(a, "die")
    VLLM.generate!(a, "ok")
    for _ <- 1..2, do: FakeEngine.ask_in_background(a, "hang")
    assert eventually(fn -> FakeEngine.in_flight(a) == 2 end)

    assert {[one, other], 2} = rows(%{search: "LiveDashboardTest"})
    assert [one.engine, other.engine] == Enum.map(names, &inspect/1)
    assert %{replica: 1, model: "llama", state: :ready, deaths: 1, restarts: 1} = one
    assert %{running: 1, waiting: 1, load_seconds: seconds} = one
    assert is_float(seconds)
    assert %{deaths: 0, restarts: 0, running: 0, waiting: 0} = other

    assert {[%{engine: "VLLM.LiveDashboardTest.A"}], 2} =
             rows(%{search: "livedashboardtest", sort_by: :deaths, sort_dir: :desc, limit: 1})

    assert {[], 0} = rows(%{search: "no such engine"})

    columns = Regex.scan(~r/field=\{:(\w+)\}/, LiveDashboard.render(%{}), capture: :all_but_first)
    fields = Enum.map(Map.keys(one), &Atom.to_string/1)
    assert Enum.sort(List.flatten(columns)) == Enum.sort(fields)
  end

  test "there is a page of nodes that run this library" do
    assert {:ok, session, process: process} = LiveDashboard.init([])
    assert is_pid(Process.whereis(process))
    assert LiveDashboard.menu_link(session, %{processes: [process]}) == {:ok, "vLLM"}
    assert LiveDashboard.menu_link(session, %{processes: []}) == :skip
  end
end
