defmodule VLLM.Web.JobsTest do
  # What is started over HTTP takes its Python from the application's environment.
  use ExUnit.Case, async: false

  import VLLM.AdminClient
  import VLLM.FakeJobs, only: [folders: 1, models: 0]
  import VLLM.OSProcess, only: [eventually: 1, eventually: 2]

  @moduletag :tmp_dir
  setup :folders

  setup do
    VLLM.FakeJobs.use_everywhere()
  end

  defp await(core, id, states) do
    assert eventually(
             fn ->
               {200, %{"job" => job}} = get(core, "quantize/jobs/" <> id)
               job["state"] in states
             end,
             60_000
           )

    {200, %{"job" => job}} = get(core, "quantize/jobs/" <> id)
    job
  end

  @tag :slow
  test "a job is started, watched, and deleted with what it has made", %{model: model} do
    core = core!()

    to = [
      %{format: "gguf", type: "Q4"},
      %{format: "gguf", type: "Q8", options: %{pure: true}},
      %{format: "awq"}
    ]

    assert {201, %{"job" => job}} =
             post(core, "quantize/jobs", %{model: model, name: "llama", to: to})

    assert %{"name" => "llama", "kind" => "quantize", "model" => ^model, "error" => nil} = job
    job = await(core, job["id"], ["done", "failed"])
    assert job["state"] == "done", inspect(job)

    assert for(
             output <- job["outputs"],
             do: {output["name"], output["format"], output["type"], output["state"]}
           ) ==
             [
               {"llama:Q4", "gguf", "Q4", "done"},
               {"llama:Q8", "gguf", "Q8", "done"},
               {"llama:awq", "awq", "awq", "done"}
             ]

    assert Enum.all?(job["outputs"], &(&1["bytes"] > 0 and &1["quality"]["kl_mean"] == 0.25))
    assert {200, %{"jobs" => [^job]}} = get(core, "quantize/jobs")
    assert {200, %{"lines" => ["== pull" | _]}} = get(core, "quantize/jobs/#{job["id"]}/log")
    assert models() == ["llama/Q4", "llama/Q8", "llama/awq"]
    assert {422, _error} = post(core, "quantize/jobs/#{job["id"]}/retry", %{})
    assert {204, nil} = delete(core, "quantize/jobs/#{job["id"]}?outputs=true")
    assert models() == []

    assert {404, %{"error" => %{"reason" => "job_not_found"}}} =
             get(core, "quantize/jobs/" <> job["id"])
  end

  @tag :slow
  test "a job is cancelled and gone on with", %{model: model, folder: folder} do
    core = core!()
    gate = Path.join(folder, "gate")
    to = [%{format: "gguf", type: "Q4", options: %{quantize: "tell:3:4;wait:#{gate}"}}]
    body = %{model: model, name: "llama", to: to, options: %{verify: false}}
    {201, %{"job" => %{"id" => id}}} = post(core, "quantize/jobs", body)
    job = await(core, id, ["quantizing"])

    assert eventually(fn ->
             match?(
               {200, %{"job" => %{"phase" => "layers", "percent" => 75}}},
               get(core, "quantize/jobs/" <> id)
             )
           end)

    assert [%{"state" => "quantizing", "error" => nil}] = job["outputs"]

    # Another of its name would make the same.
    assert {409, %{"error" => %{"reason" => "name_taken"}}} = post(core, "quantize/jobs", body)

    assert {409, %{"error" => %{"reason" => "job_running"}}} =
             delete(core, "quantize/jobs/" <> id)

    assert {200, %{"job" => %{"state" => "cancelled"} = job}} =
             post(core, "quantize/jobs/#{id}/cancel", %{})

    assert job["error"]["reason"] == "aborted"
    File.touch!(gate)

    assert {200, %{"job" => %{"state" => "queued"}}} =
             post(core, "quantize/jobs/#{id}/retry", %{})

    assert await(core, id, ["done", "failed"])["state"] == "done"
  end

  test "what can be made, and what it would take", %{model: model} do
    core = core!()
    assert {200, %{"formats" => [gguf, awq]}} = get(core, "quantize/options")

    assert gguf == %{
             "format" => "gguf",
             "types" => ["Q4_K_M"],
             "options" => [
               %{
                 "name" => "pure",
                 "type" => "bool",
                 "default" => false,
                 "allowed" => [],
                 "doc" => "All."
               }
             ],
             "refused" => nil
           }

    assert awq["refused"] == "It lacks a part."
    to = [%{format: "gguf", options: %{as: "Q4", bytes: 7, disk: 8, memory: 9}}]
    assert {200, answer} = post(core, "quantize/estimate", %{model: model, to: to})

    assert [
             %{
               "type" => "Q4",
               "bytes" => 7,
               "disk_bytes" => 8,
               "memory_bytes" => 9,
               "minutes" => [1, 2]
             }
           ] = answer["estimates"]

    assert answer["together"] == %{
             "bytes" => 7,
             "disk_bytes" => 8,
             "memory_bytes" => 9,
             "minutes" => [2, 4]
           }

    assert {422, %{"error" => %{"reason" => "invalid_option"}}} =
             post(core, "quantize/estimate", %{model: model, to: [%{format: "unheard-of"}]})
  end

  @tag :slow
  test "an engine that is started here is loaded, served and stopped" do
    core = core!(api_keys: [{"admin", admin: true}, "plain"])
    key = with_key("admin")
    asked = %{model: "refuse:not_a_model", name: "first", options: %{nursery: false}}
    assert {202, %{"engine" => engine}} = post(core, "engines", asked, key)

    assert %{"name" => "first", "served_name" => "first", "model" => "refuse:not_a_model"} =
             engine

    path = "engines/" <> engine["id"]
    told = fn -> core |> get(path, key) |> elem(1) |> Map.fetch!("engine") end
    assert eventually(fn -> told.()["state"] == "failed" end, 60_000)
    assert %{"ready" => false, "error" => %{"reason" => "not_a_model"}} = told.()
    {202, _engine} = post(core, path <> "/stop", %{}, key)

    assert {202, %{"engine" => engine}} =
             post(core, "engines", %{model: "ready", options: %{nursery: false}}, key)

    path = "engines/" <> engine["id"]

    assert eventually(
             fn ->
               match?({200, %{"engine" => %{"ready" => true}}}, get(core, path, key))
             end,
             60_000
           )

    assert {409, %{"error" => %{"reason" => "name_taken"}}} =
             post(core, "engines", %{model: "x", name: "ready"}, key)

    # Whose worker was told to make the app when it started.
    assert {:ok, [%{outputs: [%{text: "[{}]"}]}]} =
             "ready" |> VLLM.OpenAI.Models.name() |> VLLM.generate(["http"])

    # Whoever has a key may use it.
    complete = ~s({"model": "ready", "prompt": "answer:200:yes"})
    headers = [{"content-type", "application/json"} | with_key("plain")]
    assert {200, _headers, "yes"} = answer(core, "POST", "/v1/completions", complete, headers)
    {200, %{"data" => models}} = get(core, "/v1/models", with_key("plain"))
    assert "ready" in Enum.map(models, & &1["id"])

    # Another of the same model has a name of its own.
    assert {202, %{"engine" => second}} =
             post(core, "engines", %{model: "ready", options: %{nursery: false}}, key)

    assert second["name"] == "ready-2"

    for id <- [engine["id"], second["id"]],
        do: assert({202, _engine} = post(core, "engines/#{id}/stop", %{}, key))

    assert eventually(fn -> VLLM.OpenAI.Models.started() == [] end, 60_000)
  end

  @tag :slow
  test "a model is looked at before it is loaded, listed and deleted", %{model: model} do
    core = core!()

    assert {200, %{"ok?" => false, "findings" => [finding]}} =
             post(core, "models/check", %{model: model})

    assert %{"severity" => "error", "reason" => "not_a_model", "remedy" => "Take another."} =
             finding

    assert {200, estimate} =
             post(core, "models/estimate", %{model: model, options: %{device: "2x 24GiB"}})

    assert %{"fits?" => true, "available_bytes" => 40} = estimate
    assert %{"name" => "weights", "bytes" => 14} in estimate["parts"]
    assert {200, %{"models" => [listed]}} = get(core, "models")

    assert %{
             "name" => "org/llama:Q4",
             "format" => "gguf",
             "bytes" => 7,
             "job" => "1",
             "kind" => "model"
           } = listed

    # Names have slashes, whether they are encoded or not.
    for name <- ["org%2Fllama:Q4", "org/llama:Q4"],
        do: assert({200, %{"freed_bytes" => 7}} = delete(core, "models/" <> name))

    assert {404, %{"error" => %{"reason" => "model_not_found"}}} =
             delete(core, "models/unheard-of")

    assert {422, _error} = delete(core, "models/org/llama:Q4?files=false")
  end

  describe "a model is uploaded, which" do
    defp push(core, repository, model \\ "org/llama:Q4") do
      body = VLLM.JSON.encode(%{model: model, repository: repository, options: %{private: true}})
      answer(core, "POST", "models/push", body, [{"content-type", "application/json"}])
    end

    defp told(events) do
      for event <- events do
        ["event: " <> name, "data: " <> data, "", ""] = String.split(event, "\n")
        {:ok, term} = VLLM.JSON.decode(data)
        {name, term}
      end
    end

    test "is told until its end" do
      core = core!()
      {200, headers, events} = push(core, "me/llama")
      assert {"content-type", "text/event-stream"} in headers
      assert [{"progress", progress}, {"done", %{"url" => url}}] = told(events)
      assert %{"bytes" => 3, "total_bytes" => 7, "files" => 0, "seconds_left" => nil} = progress
      assert url == "https://hub.example/me/llama"

      {200, _headers, events} = push(core, "refuse:rate_limited")

      assert [{"progress", ^progress}, {"error", %{"reason" => "rate_limited", "message" => _}}] =
               told(events)

      assert Registry.keys(VLLM.Places, self()) == []
    end

    test "is refused at once where it cannot begin" do
      core = core!()
      {404, _headers, error} = push(core, "me/llama", "unheard-of")
      assert error =~ "model_not_found"

      for body <- [
            %{model: "m"},
            %{model: "m", repository: "me/m", options: %{notify: 1}},
            %{model: "m", repository: "me/m", options: %{privte: true}}
          ],
          do: assert({422, _error} = post(core, "models/push", body))

      assert Registry.keys(VLLM.Places, self()) == []
    end

    test "ends with whoever reads of it", %{folder: folder} do
      core = core!()
      begun = Process.info(self(), :links)
      {200, _headers, events} = push(core, "wait:#{folder}/never")
      assert [_progress] = Enum.take(events, 1)
      assert Process.info(self(), :links) == begun
      assert Registry.keys(VLLM.Places, self()) == []
    end
  end

  @tag :slow
  test "of what takes a process each there are few at a time", %{folder: folder} do
    core = core!()
    gate = Path.join(folder, "gate")
    ask = fn -> post(core, "models/check", %{model: "wait:#{gate}"}) end
    asked = for _ <- 1..4, do: Task.async(ask)
    assert eventually(fn -> Registry.count(VLLM.Places) >= 4 end)
    assert {429, %{"error" => %{"reason" => "overloaded"}}} = ask.()
    File.touch!(gate)
    for task <- asked, do: assert({200, _report} = Task.await(task, 30_000))
  end
end
