# The server that test/run drives: the demo model, the page, a key that may use it, and a stand-in for the hub.

data = System.fetch_env!("DASHBOARD_DATA")
Application.put_env(:ex_vllm, :data_dir, data)
data |> VLLM.HubServer.start() |> VLLM.HubServer.env() |> System.put_env()

engine =
  {VLLM,
   name: Demo.LLM,
   model: System.fetch_env!("DEMO_MODEL"),
   max_model_len: 2048,
   enforce_eager: true,
   kv_cache_memory_bytes: 64 * 1024 * 1024}

{:ok, _supervisor} = Supervisor.start_link([engine], strategy: :one_for_one)

{:ok, server} =
  VLLM.Server.start_link(
    models: [{"demo", Demo.LLM}],
    web: true,
    port: 0,
    api_keys: [{"key-of-the-test", admin: true}]
  )

IO.puts("dashboard: #{String.replace_suffix(VLLM.Server.url(server), "v1", "")}")
Process.sleep(:infinity)
