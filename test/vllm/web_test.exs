defmodule VLLM.WebTest do
  use ExUnit.Case, async: true
  doctest VLLM.Web.Figures
  doctest VLLM.Web.Machine
  doctest VLLM.Web.Schema

  import VLLM.AdminClient
  import VLLM.OSProcess, only: [eventually: 1]

  alias VLLM.Web.{Assets, Routes}

  @keys [{"admin", admin: true}, "plain"]

  # A path of a route, with something in its places.
  defp path(route), do: String.replace(route.path, ~r/\{[^}]+\}/, "some")

  # In the form that the method asks for.
  defp form("GET"), do: []
  defp form("DELETE"), do: [{"x-requested-with", "vllm"}]
  defp form("POST"), do: [{"content-type", "application/json"}]

  defp engine!(options \\ []),
    do: options |> Keyword.put_new(:script, "Paris") |> VLLM.Test.start!()

  # The one of this handle, as the API tells of it.
  defp told(core, llm) do
    {200, %{"engines" => engines}} = get(core, "engines")
    Enum.find(engines, &(&1["id"] == VLLM.Web.Engine.id(llm.id)))
  end

  describe "each route" do
    test "is refused without a key, and with one that is no admin's" do
      core = core!(api_keys: @keys)

      for route <- Routes.all(),
          {key, status, reason} <- [
            {"", 401, "no_key"},
            {"wrong", 401, "no_key"},
            {"plain", 403, "forbidden"}
          ] do
        headers = form(route.method) ++ with_key(key)

        assert {^status, %{"error" => %{"reason" => ^reason}}} =
                 ask(core, route.method, path(route), "{}", headers)
      end

      # And nobody learns without one what there is.
      for path <- ["/api/", "/api/v1/unheard-of", "/api/v2/engines"],
          method <- ~w(GET POST PUT) do
        assert {401, _error} = ask(core, method, path, "{}", form("POST"))
      end
    end

    test "takes what changes something from its own page only, and never from a form" do
      core = core!(api_keys: @keys)
      own = [{"host", "here.example:8000"} | with_key("admin")]

      for %{method: method} = route <- Routes.all(), method != "GET" do
        for headers <- [
              [],
              [{"content-type", "text/plain"}],
              [{"content-type", "application/x-www-form-urlencoded"}],
              [{"content-type", "text/plain; application/json"}],
              form(method) ++ [{"origin", "http://evil.example"}],
              form(method) ++ [{"origin", "http://here.example:8001"}],
              form(method) ++ [{"origin", "null"}]
            ] do
          assert {403, _error} = ask(core, method, path(route), "{}", headers ++ own)
        end
      end

      assert {403, _error} = get(core, "engines", [{"origin", "http://evil.example"} | own])

      assert {200, _engines} =
               get(core, "engines", [{"origin", "https://HERE.example:8000"} | own])
    end

    test "knows its methods" do
      core = core!()

      for route <- Routes.all(), method <- ["PUT", "PATCH"] do
        {405, headers, _body} = answer(core, method, path(route), "{}", form("POST"))
        assert {"allow", allowed} = List.keyfind(headers, "allow", 0)
        assert route.method in String.split(allowed, ", ")
      end

      # Which could be the name of a model.
      {405, headers, _body} = answer(core, "OPTIONS", "/api/v1/models/check", "{}", form("POST"))
      assert {"allow", "POST"} in headers
      assert {404, %{"error" => %{"reason" => "not_found"}}} = get(core, "unheard-of")
    end

    test "is described, and nothing else is" do
      {200, described} = get(core!(), "openapi.json")
      assert described["openapi"] == "3.1.0"

      operations =
        for {path, methods} <- described["paths"],
            {method, _of} <- methods,
            do: {String.upcase(method), path}

      assert Enum.sort(operations) ==
               Enum.sort(for r <- Routes.all(), do: {r.method, String.replace(r.path, "...", "")})

      ids = for {_path, of} <- described["paths"], {_method, one} <- of, do: one["operationId"]
      assert ids == Enum.uniq(ids)

      for [name] <-
            Regex.scan(~r/#\/components\/(\S+?)"/, VLLM.JSON.line(described),
              capture: :all_but_first
            ) do
        assert get_in(described, ["components" | String.split(name, "/")]), name
      end
    end
  end

  test "what is not in the form of its schema is refused, with what is the matter" do
    core = core!()

    for {path, body, status, message} <- [
          {"engines", "{", 400, "The body is not JSON."},
          {"engines", <<?", 0xFF, ?">>, 400, "The body is not JSON."},
          {"engines", "[]", 422, "The body must be of the type object; got []."},
          {"engines", %{}, 422, "`model` is missing."},
          {"engines", %{model: ""}, 422, "`model` must have at least 1 characters."},
          {"engines", %{model: "a\u0000b"}, 422, "`model` must fit the pattern"},
          {"engines", %{model: "m", nmae: "n"}, 422,
           "Unknown option `nmae`. Did you mean `name`?"},
          {"engines", %{model: "m", name: "a/b"}, 422, "`name` must fit the pattern"},
          {"engines", %{model: "m", options: [1]}, 422, "`options` must be of the type object"},
          {"quantize/compare", %{models: ["m", "m"]}, 422,
           "must not have the same element twice"},
          {"quantize/jobs", %{model: "m", to: []}, 422, "`to` must have at least 1 elements."},
          {"quantize/jobs", %{model: "m", to: [%{type: 1, format: "gguf"}]}, 422,
           "`to[0].type` must be of the type string; got 1."}
        ] do
      assert {^status, %{"error" => error}} = post(core, path, body)
      assert error["message"] =~ message
    end

    # What names a program of this machine is set where the application is.
    for option <- ~w(python env quantize_python name) do
      body = %{model: "m", options: %{option => "/bin/sh"}}

      for path <- ~w(engines models/check models/estimate) do
        assert {422, %{"error" => error}} = post(core, path, body)
        assert error["message"] =~ "`#{option}` cannot be given"
      end
    end

    for {query, status} <- [
          {"lines=0", 422},
          {"lines=x", 422},
          {"line=1", 422},
          {"lines=%zz", 422},
          {"lines=%ff", 422}
        ] do
      assert {^status, _error} = get(core, "engines/some/log?" <> query)
    end

    for path <- [
          "engines/some",
          "engines/%zz",
          "engines/%ff",
          "engines//log",
          "quantize/jobs/..%2f..",
          "quantize/jobs/%00"
        ] do
      assert {404, _error} = get(core, path)
    end
  end

  test "an engine is told of as it is" do
    llm = engine!(name: VLLM.WebTest.Told, model: "/models/llama", max_model_len: 64, replicas: 2)
    core = core!(models: [{"chat", llm}])
    VLLM.generate!(llm, "The capital of France is")
    # How busy all is was looked at a moment ago, maybe before this one was there.
    assert eventually(fn -> told(core, llm)["running"] == 0 end)

    assert %{
             "name" => "VLLM.WebTest.Told",
             "model" => "/models/llama",
             "state" => "ready",
             "ready" => true,
             "progress" => nil,
             "replicas" => [%{"index" => 1, "state" => "ready", "restarts" => 0}, %{"index" => 2}],
             "running" => 0,
             "waiting" => 0,
             "max_model_len" => 64,
             "deaths" => [],
             "served_name" => "chat",
             "error" => nil,
             "operation" => nil
           } = told = told(core, llm)

    assert {200, %{"engine" => same}} = get(core, "engines/" <> told["id"])
    assert Map.keys(same) == Map.keys(told)
    assert {200, %{"lines" => []}} = get(core, "engines/#{told["id"]}/log")
    # Of one that another serves it is not said what this one would call it.
    assert told(core!(), llm)["served_name"] == nil
  end

  test "a death is told with what was there at the end, and so is the restart" do
    llm = engine!(script: [:die, "Paris"])
    core = core!()
    {:error, %{reason: :engine_dead}} = VLLM.generate(llm, "?")
    :ok = VLLM.await_ready(llm)
    told = told(core, llm)
    assert [%{"reason" => "engine_dead", "replica" => 1, "log" => []} = death] = told["deaths"]
    assert {:ok, _time, 0} = DateTime.from_iso8601(death["time"])
    assert [%{"restarts" => 1}] = told["replicas"]
    assert told["name"] == nil
  end

  test "an engine does what it is asked to, and says what came of it" do
    llm = engine!()
    core = core!()
    id = told(core, llm)["id"]
    state = fn -> told(core, llm)["state"] end
    ask = &post(core, "engines/#{id}/#{&1}", &2)

    assert {202, %{"engine" => %{"operation" => %{"name" => "drain"}}}} = ask.("drain", %{})
    assert eventually(fn -> state.() == "drained" end)
    assert {202, _engine} = ask.("resume", %{})
    assert eventually(fn -> state.() == "ready" end)
    assert {202, _engine} = ask.("scale", %{replicas: 2})
    assert eventually(fn -> length(told(core, llm)["replicas"]) == 2 end)
    assert {202, _engine} = ask.("drain", %{replica: 2})
    assert eventually(fn -> Enum.map(VLLM.replicas!(llm), & &1.state) == [:ready, :drained] end)
    assert {202, _engine} = ask.("restart", %{})
    assert eventually(fn -> Enum.map(VLLM.replicas!(llm), & &1.state) == [:ready, :ready] end)
    assert {202, _engine} = ask.("reload", %{options: %{max_model_len: 32}})
    assert eventually(fn -> told(core, llm)["max_model_len"] == 32 end)

    done = %{"name" => "reload", "state" => "done", "error" => nil}
    assert eventually(fn -> told(core, llm)["operation"] == done end)

    # What is refused at once is told at once.
    assert {422, %{"error" => %{"message" => message}}} =
             ask.("reload", %{options: %{replicas: 3}})

    assert message =~ "`replicas` is the engine's own"

    assert %{"state" => "failed", "error" => %{"reason" => "invalid_option"}} =
             told(core, llm)["operation"]

    for operation <- ~w(drain resume restart),
        do: assert({404, _error} = ask.(operation, %{replica: 7}))

    assert {422, _error} = ask.("scale", %{replicas: 0})

    assert {202, %{"engine" => %{"state" => state}}} = ask.("stop", %{})
    assert state in ["stopping", "stopped"]
    assert eventually(fn -> told(core, llm) == nil end)
    assert {404, _error} = ask.("stop", %{})
  end

  test "an operation goes on when whoever asked for it is gone, and its error is told" do
    llm = engine!(script: %{"hold" => :hang}, shutdown_timeout: 0)
    core = core!()
    VLLM.FakeEngine.ask_in_background(llm, "hold")
    assert eventually(fn -> VLLM.FakeEngine.in_flight(llm) == 1 end)
    id = told(core, llm)["id"]
    # It waits for the request in flight.
    asker = Task.async(fn -> post(core, "engines/#{id}/drain", %{}) end)
    assert {202, %{"engine" => engine}} = Task.await(asker)
    assert %{"state" => "draining", "operation" => %{"state" => "running"}} = engine
    :ok = VLLM.stop(llm)
  end

  test "an engine that is resumed while it drains serves again once it is drained" do
    llm = engine!(script: %{"hold" => :hang})
    core = core!()
    caller = VLLM.FakeEngine.ask_in_background(llm, "hold")
    assert eventually(fn -> VLLM.FakeEngine.in_flight(llm) == 1 end)
    path = "engines/#{told(core, llm)["id"]}"
    assert {202, %{"engine" => %{"state" => "draining"}}} = post(core, path <> "/drain", %{})

    assert {202, %{"engine" => %{"operation" => operation}}} = post(core, path <> "/resume", %{})
    assert %{"name" => "resume", "state" => "running"} = operation
    Process.exit(caller, :kill)
    assert eventually(fn -> told(core, llm)["state"] == "ready" end)
  end

  test "events tell how all is, as long as somebody reads them" do
    llm = engine!()
    core = core!()
    {200, headers, events} = answer(core, "GET", "events")
    assert {"content-type", "text/event-stream"} in headers
    assert [first, second] = Enum.take(events, 2)

    for event <- [first, second] do
      assert ["event: state", "data: " <> data, "", ""] = String.split(event, "\n")
      {:ok, state} = VLLM.JSON.decode(data)
      assert Enum.any?(state["engines"], &(&1["id"] == VLLM.Web.Engine.id(llm.id)))
      assert is_list(state["jobs"])
      assert {:ok, _time, 0} = DateTime.from_iso8601(state["time"])
    end

    # Their places are free again.
    assert Registry.keys(VLLM.Places, self()) == []
    assert {200, _headers, ""} = answer(core, "HEAD", "events")
    assert Registry.keys(VLLM.Places, self()) == []
  end

  describe "the page" do
    setup do
      folder = Path.join(System.tmp_dir!(), "ex_vllm-page-#{System.unique_integer([:positive])}")
      File.mkdir_p!(Path.join(folder, "assets"))
      on_exit(fn -> File.rm_rf!(folder) end)

      for {name, text} <- [
            {"index.html", "page"},
            {"assets/a-1.js", "script"},
            {"assets/.env", "x"},
            {"source.sha256", "x"}
          ] do
        File.write!(Path.join(folder, name), text)
      end

      %{folder: folder}
    end

    test "is what there is in its folder and nothing else", %{folder: folder} do
      files = Assets.read(folder)
      assert files |> Map.keys() |> Enum.sort() == ["/", "/assets/a-1.js"]
      {headers, "page"} = files["/"]
      assert {"content-type", "text/html; charset=utf-8"} in headers
      assert {"cache-control", "no-cache"} in headers
      {_name, policy} = List.keyfind(headers, "content-security-policy", 0)
      assert policy =~ "default-src 'none'; script-src 'self'"
      refute policy =~ "unsafe"
      {headers, "script"} = files["/assets/a-1.js"]
      assert {"cache-control", "public, max-age=31536000, immutable"} in headers
    end

    test "has no key to ask for, and no way out of its folder" do
      core = core!(api_keys: @keys)
      assert {status, _headers, _body} = answer(core, "GET", "/")
      assert status in [200, 404]

      for path <-
            ~w(/assets/ /assets/../index.html /assets/..%2f..%2fmix.exs /assets/%2e%2e/index.html /assets//etc/passwd
                     /assets/.env /source.sha256 /index.html) do
        assert {status, _headers, _body} = answer(core, "GET", path)
        assert status in [404, 401]
      end

      assert {405, _headers, _body} = answer(core, "POST", "/", "{}", form("POST"))
    end
  end

  test "without `web: true` there is none of it" do
    core = %{core!(models: [engine!()]) | web: false}
    for path <- ["/", "/assets/a.js", "/api/v1/engines"], do: assert({404, _} = get(core, path))
    assert {200, _models} = get(core, "/v1/models")
  end

  test "what is wrong with keys is said without them" do
    {:ok, known} =
      VLLM.Options.only([api_keys: [{"sk-secret", admn: true}]], VLLM.Options.server())

    assert {:error, error} = VLLM.OpenAI.new(Map.put(known, :models, [:a]), nil)
    assert error.message =~ "`admin:`"
    refute inspect(error) =~ "sk-secret"
    refute inspect(core!(api_keys: [{"sk-secret", admin: true}])) =~ "sk-secret"
  end
end
